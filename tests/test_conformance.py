"""Anyone's port against the golden vectors: what is right passes, what is off is named, what was not run is said."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms import core
from ada2ms.conformance import check
from ada2ms.core import golden
from ada2ms.core.cases import Array
from ada2ms.core.spec import BFLOAT16, rounded, widen

CASES = {case.id: case for case in golden.load()}
SOME = [case for case in CASES.values() if len(case.gradients) < 50]


class Port:
    """The rule in NumPy, by the interface that a port has; `grouped` as it takes groups."""

    def __init__(self, params: list[Array], **hyper: Any) -> None:
        kinds = hyper.pop("dtypes", [None] * len(params))
        arrays = [self.made(p, kind) for p, kind in zip(params, kinds, strict=True)]
        groups = hyper.pop("groups", [{"params": range(len(params))}])
        given = [{**group, "params": [arrays[i] for i in group["params"]]} for group in groups]
        self.optimizer = core.Ada2MS(given, **hyper)

    @staticmethod
    def made(p: Array, kind: str | None) -> Array:
        return rounded(p, BFLOAT16) if kind == "bfloat16" else p.astype(kind or p.dtype)

    def step(self, gradients: Sequence[Array | None]) -> None:
        with np.errstate(all="ignore"):
            self.optimizer.step(gradients)

    @property
    def params(self) -> list[Array]:
        return [widen(p) for group in self.optimizer.groups for p in group.params]

    @property
    def compensation(self) -> list[Array | None]:
        return [None if x is None else widen(x) for group in self.optimizer.groups for x in group.compensation]


def plain(params: list[Array], *, lr: Any, b1: float, b2: float, eps: float, weight_decay: float, adaptivity: Any,
          scope: str) -> Port:  # fmt: skip
    """A port without groups, clipping and so on."""
    return Port(params, lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, adaptivity=adaptivity, scope=scope)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_rule_is_right(dtype: str) -> None:
    report = check(Port, dtype=dtype, cases=SOME)
    assert report.ok, str(report)
    assert {len(report.checked) + len(report.unchecked)} == {len(SOME)}
    assert report.complete == (dtype == "float32")  # 16 bits are computed in float32
    assert str(report).startswith(f"{len(report.checked)} of {len(report.checked)} cases are right in {dtype}; the wor")


def test_what_a_port_has_no_argument_for_is_not_checked_and_no_pass() -> None:
    report = check(plain, cases=SOME)
    assert report.ok
    assert not report.complete
    assert len(report.checked) + len(report.unchecked) == len(SOME)
    for argument in ("max_norm", "nonfinite", "groups"):
        assert f"not checked: {argument}"[:11] in str(report)
        assert any(argument in reason for reason in report.unchecked.values())
    assert not check(plain, cases=[CASES["clip/always-model"]]).ok


class Refusing(Port):
    def __init__(self, params: list[Array], **hyper: Any) -> None:
        if hyper["scope"] == "tensor":
            raise NotImplementedError("a mean for each tensor")
        super().__init__(params, **hyper)


def test_what_a_port_refuses_is_not_checked() -> None:
    report = check(Refusing, cases=[CASES["basics/defaults-model"], CASES["basics/defaults-tensor"]])
    assert report.ok
    assert report.unchecked == {"basics/defaults-tensor": "a mean for each tensor"}


class Forgetful(Port):
    """Which takes a missing gradient for zeros."""

    def step(self, gradients: Sequence[Array | None]) -> None:
        super().step([np.zeros(p.shape) if g is None else g for p, g in zip(self.params, gradients, strict=True)])


class Crashing(Port):
    def step(self, gradients: Sequence[Array | None]) -> None:
        raise RuntimeError("no step")


class Short(Port):
    @property
    def params(self) -> list[Array]:
        return super().params[:-1]


class Flat(Port):
    @property
    def params(self) -> list[Array]:
        return [p.ravel() for p in super().params]


class Stateless(Port):
    """Which keeps nothing of what 16 bits lose: its parameters are not what they would be with it."""

    compensation = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("port", "case", "reason"),
    [
        (Forgetful, "missing/alternating-model", "missing/alternating-model, step "),
        (Crashing, "basics/defaults-model", "the optimizer raised RuntimeError: no step"),
        (Short, "basics/defaults-model", "params are 1, and not 2"),
        (Flat, "basics/defaults-model", "has shape"),
        (Stateless, next(id_ for id_, case in CASES.items() if case.compensated), "is off by"),
    ],
)
def test_what_is_off_is_named(port: Any, case: str, reason: str) -> None:
    report = check(port, dtype="float32", cases=[CASES[case], CASES["basics/defaults-model"]])
    assert not report.ok
    assert reason in str(report.wrong[case])
    assert reason in str(report)


def test_a_precision_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"Invalid dtype: 'float16' \(dtype must be 'float64' or 'float32'\)"):
        check(Port, dtype="float16")


EXAMPLE = Path(__file__).parents[1] / "examples" / "port_c.py"


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler")
def test_the_port_to_c(tmp_path: Path) -> None:
    """It is right as it is; and wrong, and named so, with decay after the update."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", str(EXAMPLE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    right = run()
    assert right.returncode == 0, right.stderr
    assert right.stdout.startswith("138 of 138 cases are right in float64; the worst update is off by ")
    assert "not checked: 22 cases, such as clip/groups-model: make does not take what it needs" in right.stdout
    source, line = EXAMPLE.with_name("port.c").read_text(), "x->p[i] * (1 - lr * o->weight_decay) - lr * m_hat / d"
    assert source.count(line) == 1
    (tmp_path / "wrong.c").write_text(source.replace(line, "(x->p[i] - lr * m_hat / d) * (1 - lr * o->weight_decay)"))
    wrong = run(str(tmp_path / "wrong.c"))
    assert wrong.returncode == 1, wrong.stderr
    assert "off: basics/defaults-model, step 1: update 0 is off by" in wrong.stdout
    assert "(it is there to tell: decay not scaled by lr; " in wrong.stdout
    assert "off: 119 cases more, in `wrong`" in wrong.stdout
