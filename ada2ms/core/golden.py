"""Golden vectors: optimizer runs with the exact result, for any implementation of the rule in any language.

    python -m ada2ms.core.golden --check    make them again, compare byte for byte, verify the checksums
    python -m ada2ms.core.golden --write    make them again and write them (both need the extra `dev`)

The files, `vectors/*.json`, hold floats as C99 hexadecimal strings (`float.hex`), tensors as flat lists in C order. A
case spells out its hyperparameters, initial parameters, the gradients of every step (null: that tensor has none), and
parameters and state after the recorded steps; its flags point at the file's notes. `lr` is a number, or a list with
one number per step; `adaptivity` is a number or a schedule as in `ada2ms.core.schedules`. Parameters and gradients are
exact in float32, so that implementations in either precision start from the same numbers. Results come from
arithmetic of 50 digits (`ada2ms.core.oracle`) and are the nearest doubles. Compare updates, p_t - p_0, rather than
parameters, in which a large value hides a wrong update.

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
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.core.hyperparameters import Nonfinite, Scope
from ada2ms.core.schedules import AdaptivitySchedule, from_dict
from ada2ms.core.spec import VERSION

SCHEMA: Final = 1  # of the files
SPEC: Final = VERSION
FLOOR: Final = 120  # fewer cases than this are an error: an empty run must not pass
CHECKSUMS: Final = "SHA256SUMS"  # as written and read by sha256sum
LIMIT: Final = 1_000_000  # bytes, all files together

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CaseGroup:
    """A parameter group: initial parameters and hyperparameters."""

    params: tuple[Array, ...]
    lr: tuple[float, ...]  # one per step, also where the file gives one number for all
    b1: float
    b2: float
    eps: float
    weight_decay: float
    adaptivity: float | AdaptivitySchedule


@dataclass(frozen=True, eq=False)
class ExpectedGroup:
    """A group's parameters and state, by the slot names of `ada2ms.core.spec`."""

    params: tuple[Array, ...]
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
    groups: tuple[CaseGroup, ...]
    gradients: tuple[tuple[Array | None, ...], ...]  # per step, in the order of the parameters, group after group
    expected: tuple[Expected, ...]


@functools.cache
def load() -> tuple[Case, ...]:
    """Every golden case, after verifying the checksums.

    Raises:
        ValueError: a file is missing, unlisted or changed, or there are fewer cases than there must be.
    """
    if problems := _verify(shipped := _shipped()):
        raise ValueError("Golden vectors are damaged: " + "; ".join(problems))
    contents = [json.loads(data) for name, data in sorted(shipped.items()) if name != CHECKSUMS]
    return tuple(_case(data) for content in contents for data in content["cases"])


def make() -> dict[str, bytes]:
    """Every file by name, made anew with the oracle; needs the extra `dev`."""
    from ada2ms.core import golden_cases, oracle  # not at the top: loading needs neither

    made = {}
    for theme, (comment, cases) in golden_cases.themes().items():
        flags = sorted({flag for case in cases for flag in case["flags"]})
        content = {
            "schema": SCHEMA,
            "spec": SPEC,
            "generator": "ada2ms.core.oracle: mpmath, 50 digits",
            "comment": comment,
            "notes": {flag: golden_cases.NOTES[flag] for flag in flags},
            "cases": [
                {**{name: value for name, value in case.items() if name != "record"}, "expected": oracle.expected(case)}
                for case in cases
            ],
        }
        made[f"{theme}.json"] = (_layout(_encode(content)) + "\n").encode()
    made[CHECKSUMS] = _checksums(made)
    return made


def check() -> list[str]:
    """What is wrong with the shipped vectors: empty if nothing is; needs the extra `dev`."""
    shipped, made = _shipped(), make()
    differing = [f"{name} is not what the oracle makes" for name in made if made[name] != shipped.get(name)]
    too_large = [f"the files exceed {LIMIT} bytes"] if sum(map(len, shipped.values())) > LIMIT else []
    return _verify(shipped) + differing + too_large


def write() -> None:
    """Replaces the shipped vectors by those that the oracle makes; needs the extra `dev`."""
    folder = Path(str(_folder()))
    made = make()
    for path in folder.glob("*"):
        path.unlink()
    for name, data in made.items():
        (folder / name).write_bytes(data)


def _folder() -> Any:
    return files("ada2ms.core") / "vectors"


def _shipped() -> dict[str, bytes]:
    folder = _folder()
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


def _checksums(contents: dict[str, bytes]) -> bytes:
    names = sorted(name for name in contents if name != CHECKSUMS)
    return "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in names).encode()


def _parse(checksums: bytes) -> dict[str, str]:
    """Checksums by name."""
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in checksums.decode().splitlines())}


def _verify(shipped: dict[str, bytes]) -> list[str]:
    listed, actual = (_parse(sums) for sums in (shipped.get(CHECKSUMS, b""), _checksums(shipped)))
    wrong = sorted(name for name in listed.keys() | actual.keys() if listed.get(name) != actual.get(name))
    if wrong:
        return [f"{name} does not match {CHECKSUMS}" for name in wrong]
    count = sum(len(json.loads(shipped[name])["cases"]) for name in actual)
    return [f"{count} cases, fewer than {FLOOR}"] if count < FLOOR else []


def _encode(value: Any) -> Any:
    """The same data with floats as hexadecimal strings."""
    if isinstance(value, dict):
        return {name: _encode(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(x) for x in value]
    return value.hex() if isinstance(value, float) else value


def _layout(value: Any, indent: str = "") -> str:
    """JSON, a value to a line where it fits: legible, and half the size of an indentation throughout."""
    line = json.dumps(value)
    if len(indent) + len(line) <= 120 or not isinstance(value, (dict, list)):
        return line
    inner = indent + " "
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        return f"[{', '.join(map(json.dumps, value))}]"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _layout(x, inner) for x in value) + f"\n{indent}]"
    items = (f"{inner}{json.dumps(name)}: {_layout(x, inner)}" for name, x in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def _array(values: list[str], shape: tuple[int, ...]) -> Array:
    array = np.array([float.fromhex(x) for x in values], np.float64).reshape(shape)
    array.flags.writeable = False
    return array


def _case(data: dict[str, Any]) -> Case:
    shapes = [[tuple(p["shape"]) for p in group["params"]] for group in data["groups"]]
    flat = [shape for group in shapes for shape in group]
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
        groups=tuple(_group(group, len(gradients)) for group in data["groups"]),
        gradients=gradients,
        expected=tuple(
            Expected(
                record["step"],
                tuple(_expected(group, s) for group, s in zip(record["groups"], shapes, strict=True)),
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
        params=tuple(_array(p["values"], tuple(p["shape"])) for p in data["params"]),
        lr=tuple(map(float.fromhex, lr)),
        b1=float.fromhex(data["b1"]),
        b2=float.fromhex(data["b2"]),
        eps=float.fromhex(data["eps"]),
        weight_decay=float.fromhex(data["weight_decay"]),
        adaptivity=float.fromhex(a) if isinstance(a, str) else a,
    )


def _expected(data: dict[str, Any], shapes: list[tuple[int, ...]]) -> ExpectedGroup:
    def arrays(name: str) -> tuple[Array, ...]:
        return tuple(_array(values, shape) for values, shape in zip(data[name], shapes, strict=True))

    return ExpectedGroup(
        params=arrays("params"),
        exp_avg=arrays("exp_avg"),
        exp_avg_sq=arrays("exp_avg_sq"),
        step=tuple(data["step"]),
        global_exp_avg_sq=tuple(map(float.fromhex, data["global_exp_avg_sq"])),
        global_step=data["global_step"],
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 where `--check` finds something wrong."""
    parser = argparse.ArgumentParser(prog="python -m ada2ms.core.golden", description="The golden vectors of Ada2MS.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="make them again and compare byte for byte")
    action.add_argument("--write", action="store_true", help="make them again and replace the files")
    if parser.parse_args(arguments).write:
        write()
    problems = check()
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(load())} golden cases in {len(_shipped()) - 1} files, as the oracle makes them")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
