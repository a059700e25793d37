"""What must stand before a framework is imported."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers that each take all cores take very long

import pytest

with suppress(ImportError):
    import triton  # noqa: F401  # for torch; after TensorFlow 2.20 or 2.21 it crashes (tensorflow/tensorflow#124205)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test may be in none of the processes that dev.py starts."""
    for item in items:
        of_keras = item.path.name.startswith("test_keras")
        if of_keras and not (item.get_closest_marker("keras") or item.get_closest_marker("slow")):
            raise pytest.UsageError(
                f"{item.nodeid} must be marked keras or slow: `python dev.py test` would not run it"
            )


@pytest.fixture(autouse=True)
def keras_keeps_its_precision() -> Iterator[None]:
    """No test may leave Keras' default precision changed for those that follow."""
    yield
    if keras := sys.modules.get("keras"):
        found = keras.config.floatx(), keras.config.dtype_policy().name
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        assert found == ("float32", "float32")
