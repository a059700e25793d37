"""Makes the files of golden vectors of the cases and the oracle, compares them with those shipped, and writes them."""

import json
from pathlib import Path
from typing import Any, Final

from ada2ms.core import golden

from . import build, cases, oracle

LIMIT: Final = 1_000_000  # bytes, all files together
# What the files say of the oracle: where it was when they were made, since to say otherwise would change each of them.
GENERATOR: Final = "ada2ms.core.oracle: mpmath, 50 digits"


def make() -> dict[str, bytes]:
    """Every file by name, made anew with the oracle."""
    made = {}
    for theme, (comment, given) in cases.themes().items():
        flags = sorted({flag for case in given for flag in case["flags"]})
        content = {
            "schema": golden.SCHEMA,
            "spec": golden.SPEC,
            "generator": GENERATOR,
            "comment": comment,
            "notes": {flag: build.NOTES[flag] for flag in flags},
            "cases": [
                {**{name: value for name, value in case.items() if name != "record"}, "expected": oracle.expected(case)}
                for case in given
            ],
        }
        made[f"{theme}.json"] = (_layout(_encode(content)) + "\n").encode()
    made[golden.CHECKSUMS] = golden.checksums(made)
    return made


def check() -> list[str]:
    """What is wrong with the shipped vectors: empty if nothing is."""
    shipped, made = golden.shipped(), make()
    differing = [f"{name} is not what the oracle makes" for name in made if made[name] != shipped.get(name)]
    too_large = [f"the files exceed {LIMIT} bytes"] if sum(map(len, shipped.values())) > LIMIT else []
    return golden.verify(shipped) + differing + too_large


def write() -> None:
    """Replaces the shipped vectors by those that the oracle makes."""
    folder = Path(str(golden.folder()))
    made = make()
    for path in folder.glob("*"):
        if path.name != golden.JSON_SCHEMA:
            path.unlink()
    for name, data in made.items():
        (folder / name).write_bytes(data)


def _encode(value: Any) -> Any:
    """The same data with floats as hexadecimal strings."""
    if isinstance(value, dict):
        return {name: _encode(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(x) for x in value]
    return _hex(value) if isinstance(value, float) else value


def _hex(x: float) -> str:
    """`float.hex` without the zeros at the end, of which numbers that are exact in float32 have many."""
    mantissa, p, exponent = x.hex().partition("p")
    return f"{mantissa.rstrip('0').removesuffix('.') if '.' in mantissa else mantissa}{p}{exponent}"


def _layout(value: Any, indent: str = "") -> str:
    """JSON, a value to a line where it fits: legible, and half the size of an indentation throughout."""
    line = json.dumps(value, separators=(",", ": "))
    flat = isinstance(value, list) and not any(isinstance(x, (dict, list)) for x in value)
    if flat or len(indent) + len(line) <= 120 or not isinstance(value, (dict, list)):
        return line
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _layout(x, inner) for x in value) + f"\n{indent}]"
    items = (f"{inner}{json.dumps(name)}: {_layout(x, inner)}" for name, x in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
