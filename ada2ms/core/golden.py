"""Golden vectors: optimizer runs with the exact result, for any implementation of the rule in any language.

    python -m ada2ms.core.golden --check    verifies the checksums of what is installed

The files, `vectors/*.json` (`vectors/schema.json` describes them), hold floats as C99 hexadecimal strings
(`float.fromhex`), tensors as flat lists in C order. A case spells out its hyperparameters, initial parameters, the
gradients of every step (null: that tensor has none), and parameters and state after the recorded steps; its flags point
at the file's notes. `lr` is a number, or a list with one number per step; `adaptivity` is a number or a schedule as in
`ada2ms.core.schedules`. `max_norm` is there if it is not None, and `compensated` if it is true; then a parameter with a
`dtype`, "float16" or "bfloat16", and its compensation are integers of 16 bits, and its gradients are exact in that
type. Parameters and gradients are exact in float32, so that implementations in either precision start from the same
numbers. Results come from arithmetic of 50 digits and are the nearest doubles; `tests/golden` in the repository makes
them. Compare updates, p_t - p_0, rather than parameters, in which a large value hides a wrong update; and where there
is a compensation, p_t + compensation - p_0.

    >>> from ada2ms.core import golden
    >>> case = golden.load()[0]
    >>> len(case.groups[0].lr) == len(case.gradients)
    True
"""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.hyperparameters import Nonfinite, Scope
from ada2ms.core.schedules import AdaptivitySchedule, from_dict
from ada2ms.core.spec import BFLOAT16, VERSION, widen

SCHEMA: Final = 2  # of the files
SPEC: Final = VERSION
FLOOR: Final = 180  # fewer cases than this are an error: an empty run must not pass
CHECKSUMS: Final = "SHA256SUMS"  # as written and read by sha256sum
JSON_SCHEMA: Final = "schema.json"  # beside the vectors: what their files look like, for readers in any language

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CaseGroup:
    """A parameter group: initial parameters, with the type of 16 bits of each or None, and hyperparameters."""

    params: tuple[Array, ...]
    dtypes: tuple[str | None, ...]
    lr: tuple[float, ...]  # one per step, also where the file gives one number for all
    b1: float
    b2: float
    eps: float
    weight_decay: float
    adaptivity: float | AdaptivitySchedule


@dataclass(frozen=True, eq=False)
class ExpectedGroup:
    """A group's parameters and state, by the slot names of `ada2ms.core.spec`; a compensation of a wide one is None."""

    params: tuple[Array, ...]
    compensation: tuple[Array | None, ...]
    exp_avg: tuple[Array, ...]
    exp_avg_sq: tuple[Array, ...]
    step: tuple[int, ...]
    global_exp_avg_sq: tuple[float, ...]  # scope "model": one number; scope "tensor": one per tensor
    global_step: int


@dataclass(frozen=True, eq=False)
class Expected:
    """What holds after `step` steps (calls, whether or not they changed anything)."""

    step: int
    groups: tuple[ExpectedGroup, ...]
    skipped: int


@dataclass(frozen=True, eq=False)
class Case:
    """One run. Arrays are float64, exact in float32 where they are inputs, and read-only: copy before updating.

    `lr` is constant in the cases in which a step changes nothing (`nonfinite`, or no gradient at all), so that
    indexing it by calls or by completed updates is the same.
    """

    id: str
    comment: str
    flags: tuple[str, ...]
    scope: Scope
    nonfinite: Nonfinite
    max_norm: float | None
    compensated: bool
    groups: tuple[CaseGroup, ...]
    gradients: tuple[tuple[Array | None, ...], ...]  # per step, in the order of the parameters, group after group
    expected: tuple[Expected, ...]


@functools.cache
def load() -> tuple[Case, ...]:
    """Every golden case, after verifying the checksums.

    Raises:
        ValueError: a file is missing, unlisted or changed, or there are fewer cases than there must be.
    """
    if problems := verify(found := shipped()):
        raise ValueError("Golden vectors are damaged: " + "; ".join(problems))
    contents = [json.loads(data) for name, data in sorted(found.items()) if name != CHECKSUMS]
    return tuple(_case(data) for content in contents for data in content["cases"])


def folder() -> Any:
    """Where the files are."""
    return files("ada2ms.core") / "vectors"


def shipped() -> dict[str, bytes]:
    """The files of vectors, and their checksums, by name."""
    vectors = folder()
    found = [path for path in vectors.iterdir() if path.name != JSON_SCHEMA] if vectors.is_dir() else []
    return {path.name: path.read_bytes() for path in found}


def checksums(contents: dict[str, bytes]) -> bytes:
    """What the checksum file says of these files, itself left out."""
    names = sorted(name for name in contents if name != CHECKSUMS)
    return "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in names).encode()


def _parse(checksums: bytes) -> dict[str, str]:
    """Checksums by name."""
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in checksums.decode().splitlines())}


def verify(contents: dict[str, bytes]) -> list[str]:
    """What is wrong with files, given by name: checksums, or too few cases; empty if nothing is."""
    listed, actual = (_parse(sums) for sums in (contents.get(CHECKSUMS, b""), checksums(contents)))
    wrong = sorted(name for name in listed.keys() | actual.keys() if listed.get(name) != actual.get(name))
    if wrong:
        return [f"{name} does not match {CHECKSUMS}" for name in wrong]
    count = sum(len(json.loads(contents[name])["cases"]) for name in actual)
    return [f"{count} cases, fewer than {FLOOR}"] if count < FLOOR else []


def _array(values: list[Any], shape: tuple[int, ...], dtype: str | None = None) -> Array:
    """An array of hexadecimal strings or, of a type of 16 bits, of integers."""
    if dtype is None:
        array = np.array([float.fromhex(x) for x in values], np.float64).reshape(shape)
    else:
        bits = np.array(values, np.uint16).reshape(shape)
        array = np.array(widen(bits.view(BFLOAT16 if dtype == "bfloat16" else dtype)), np.float64)
    array.flags.writeable = False
    return array


def _case(data: dict[str, Any]) -> Case:
    flat = [tuple(p["shape"]) for group in data["groups"] for p in group["params"]]
    gradients = tuple(
        tuple(None if g is None else _array(g, shape) for g, shape in zip(row, flat, strict=True))
        for row in data["gradients"]
    )
    return Case(
        id=data["id"],
        comment=data["comment"],
        flags=tuple(data["flags"]),
        scope=data["scope"],
        nonfinite=data["nonfinite"],
        max_norm=float.fromhex(data["max_norm"]) if "max_norm" in data else None,
        compensated=data.get("compensated", False),
        groups=tuple(_group(group, len(gradients)) for group in data["groups"]),
        gradients=gradients,
        expected=tuple(
            Expected(
                record["step"],
                tuple(_expected(at, group) for at, group in zip(record["groups"], data["groups"], strict=True)),
                record["skipped"],
            )
            for record in data["expected"]
        ),
    )


def _group(data: dict[str, Any], steps: int) -> CaseGroup:
    lr = [data["lr"]] * steps if isinstance(data["lr"], str) else data["lr"]
    a = data["adaptivity"]
    if isinstance(a, dict):
        numbers = {name: float.fromhex(x) if isinstance(x, str) else x for name, x in a.items() if name != "schedule"}
        a = from_dict({"schedule": a["schedule"], **numbers})
    return CaseGroup(
        params=tuple(_array(p["values"], tuple(p["shape"]), p.get("dtype")) for p in data["params"]),
        dtypes=tuple(p.get("dtype") for p in data["params"]),
        lr=tuple(map(float.fromhex, lr)),
        b1=float.fromhex(data["b1"]),
        b2=float.fromhex(data["b2"]),
        eps=float.fromhex(data["eps"]),
        weight_decay=float.fromhex(data["weight_decay"]),
        adaptivity=float.fromhex(a) if isinstance(a, str) else a,
    )


def _expected(data: dict[str, Any], group: dict[str, Any]) -> ExpectedGroup:
    shapes = [tuple(p["shape"]) for p in group["params"]]
    dtypes = [p.get("dtype") for p in group["params"]]
    wide = [None] * len(shapes)

    def arrays(name: str, types: Sequence[str | None]) -> tuple[Array, ...]:
        return tuple(_array(*given) for given in zip(data[name], shapes, types, strict=True))

    compensation = zip(data.get("compensation", wide), shapes, dtypes, strict=True)
    return ExpectedGroup(
        params=arrays("params", dtypes),
        compensation=tuple(None if given[0] is None else _array(*given) for given in compensation),
        exp_avg=arrays("exp_avg", wide),
        exp_avg_sq=arrays("exp_avg_sq", wide),
        step=tuple(data["step"]),
        global_exp_avg_sq=tuple(map(float.fromhex, data["global_exp_avg_sq"])),
        global_step=data["global_step"],
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 where `--check` finds something wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ada2ms.core.golden",
        description="The golden vectors of Ada2MS. `python -m tests.golden`, in the repository, makes them again.",
    )
    parser.add_argument("--check", action="store_true", required=True, help="verify the checksums")
    parser.parse_args(arguments)
    try:
        count = len(load())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{count} golden cases in {len(shipped()) - 1} files, as {CHECKSUMS} lists them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
