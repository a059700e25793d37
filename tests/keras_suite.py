"""Runs the tests that Keras ships over one optimizer in place of several of Keras' own: `keras_suite.py SUBJECT`.

SUBJECT is AdamW or Ada2MS; modules of `keras.src` may follow, such as `trainers/trainer_test.py`. Not a test module
itself: test_keras_suite.py runs it in processes of its own, on each Keras backend, since it exchanges classes in Keras
before the tests are imported. Prints the outcomes of all tests, as JSON in the last line.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import keras
import pytest

from ada2ms.tf import Ada2MS

SUBJECTS: dict[str, type] = {"AdamW": keras.optimizers.AdamW, "Ada2MS": Ada2MS}
# Whom it stands for, and with which defaults: those of Adam and AdamW, whose tests have numbers in them. Tests of SGD
# whose gradients are ones hold for every subject, at every adaptivity: it moves by the learning rate.
REPLACED: dict[str, dict[str, Any]] = {
    "SGD": {"weight_decay": 0.0},
    "RMSprop": {"weight_decay": 0.0},
    "Adam": {"weight_decay": 0.0, "epsilon": 1e-7, "adaptivity": 1.0},
    "AdamW": {"weight_decay": 0.004, "epsilon": 1e-7, "adaptivity": 1.0},
}
FOREIGN = {"momentum", "nesterov", "amsgrad", "rho", "centered"}  # options of theirs that are left out
MODULES = [
    *(f"optimizers/{n}_test.py" for n in ("adamw", "adam", "optimizer", "optimizer_sparse")),
    *(f"optimizers/{n}_test.py" for n in ("loss_scale_optimizer", "multi_optimizer")),
    *(f"backend/tensorflow/{n}_test.py" for n in ("optimizer_distribute", "distribute")),
    *(f"callbacks/{n}_test.py" for n in ("learning_rate_scheduler", "reduce_lr_on_plateau", "early_stopping")),
    *(f"callbacks/{n}_test.py" for n in ("swap_ema_weights", "backup_and_restore", "terminate_on_nan")),
    *("models/model_test.py", "models/variable_mapping_test.py", "saving/saving_lib_test.py"),
]


def stand_in(name: str, subject: str) -> type:
    """A class of that name, derived from the subject's."""
    base = SUBJECTS[subject]
    left_out = FOREIGN | ({"adaptivity"} if subject == "AdamW" else set())

    def initialize(self: Any, learning_rate: Any = 0.001, **kwargs: Any) -> None:
        given = {**REPLACED[name], **kwargs}
        base.__init__(self, learning_rate, **{k: v for k, v in given.items() if k not in left_out})  # type: ignore[misc]

    def create(cls: type, *_: Any, **__: Any) -> Any:
        # As Keras does, except on torch, where it takes a class of its own for one so called.
        return object.__new__(cls)

    cls = type(name, (base,), {"__new__": create, "__init__": initialize, "__module__": "keras_suite"})
    globals()[name] = cls  # where pickle looks for it
    return keras.saving.register_keras_serializable("suite")(cls)  # type: ignore[no-any-return]


def exchange(subject: str) -> None:
    """In the modules that tests import these classes from, and for their names as strings."""
    optimizers = importlib.import_module("keras.src.optimizers")
    for name in REPLACED:
        cls = stand_in(name, subject)
        for module in (optimizers, keras.optimizers, importlib.import_module(f"keras.src.optimizers.{name.lower()}")):
            setattr(module, name, cls)
        optimizers.ALL_OBJECTS_DICT[name.lower()] = cls


class Outcomes:
    """A plugin of pytest that keeps what became of every test: "passed", or what else and why."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = "" if report.passed else f": {str(report.longrepr)[-2000:]}"
            self.found[report.nodeid.rpartition("keras/src/")[2]] = report.outcome + reason

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found[report.nodeid] = f"not collected: {report.longrepr}"


def main() -> None:
    subject, *modules = sys.argv[1:]
    sys.modules["keras_suite"] = sys.modules[__name__]
    exchange(subject)
    source = Path(keras.__file__).parent / "src"
    outcomes = Outcomes()
    options = ["-q", "-c", "/dev/null", "--rootdir", str(source), "-W", "ignore"]
    with contextlib.redirect_stdout(io.StringIO()):
        plugins = ["-p", "no:cacheprovider"]
        pytest.main([*options, *plugins, *(str(source / name) for name in modules or MODULES)], plugins=[outcomes])
    print(json.dumps(outcomes.found))


if __name__ == "__main__":
    main()
