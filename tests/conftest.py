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


@pytest.fixture(autouse=True)
def keras_keeps_its_precision() -> Iterator[None]:
    """No test may leave Keras' default precision changed for those that follow."""
    yield
    if keras := sys.modules.get("keras"):
        found = keras.config.floatx(), keras.config.dtype_policy().name
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        assert found == ("float32", "float32")
