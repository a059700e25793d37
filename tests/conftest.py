"""What must stand before a framework is imported."""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes that each take all cores take very long

import pytest

with suppress(ImportError):
    import triton  # noqa: F401  # for torch; after TensorFlow 2.20 or 2.21 it crashes (tensorflow/tensorflow#124205)


# By the beginnings of file::test, what a backend of Keras compiles test by test: there it is for `make slow`.
DEAR_WHERE_COMPILED = ("test_keras_clipping", "test_keras_compensated", "test_keras_groups")
DEAR = {
    "tensorflow": DEAR_WHERE_COMPILED,
    "jax": (
        *DEAR_WHERE_COMPILED,
        "test_handoff_auto",
        "test_handoff_groups",
        "test_handoff_models",
        "test_handoff_receipt",
        "test_handoff_refused",
        "test_identify_real",
        "test_keras_calls",
        "test_keras_exclusions",
        "test_keras_files",
        "test_keras_handoff",
        "test_keras_outputs",
        "test_keras_trace",
        "test_keras_variables",
        "test_trajectories::test_closed_loop",
    ),
    "torch": (
        "test_keras_exclusions::test_a_saved_model_goes_on_as_before",
        "test_trajectories::test_closed_loop_float64[jax-keras",  # torch is compared with both
    ),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is run by one of the processes that dev.py starts, which divides them by files and marks."""
    for item in items:
        name, marks = item.path.name, {mark.name for mark in item.iter_markers()}
        if name.startswith("test_keras") and marks.isdisjoint({"keras", "slow"}):
            raise pytest.UsageError(f"{item.nodeid}: `python dev.py test` would not run it; mark it keras or slow")
        if name.startswith(("test_torch", "test_compare", "test_jax")) and "keras" in marks:
            raise pytest.UsageError(f"{item.nodeid}: `python dev.py test` would not run it; keras is for other files")
        if "keras" in marks and f"{item.path.stem}::{item.name}".startswith(DEAR[os.environ["KERAS_BACKEND"]]):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Keras before 3.10 trains on JAX by what JAX 0.8 has no more; there any optimizer fails."""
    try:
        return (yield)
    except AttributeError as error:
        if str(error) == "module 'jax' has no attribute 'spmd_mode'":
            pytest.skip("the `fit` of this Keras does not run on this JAX, with any optimizer")
        raise


@pytest.fixture(autouse=True)
def keras_keeps_its_precision() -> Iterator[None]:
    """No test may leave Keras' default precision changed for those that follow."""
    yield
    if keras := sys.modules.get("keras"):
        found = keras.config.floatx(), keras.config.dtype_policy().name
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        assert found == ("float32", "float32")
