"""The JSON schema of the vectors' files describes them, and nothing that they are not."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from ada2ms.core import golden

SCHEMA = json.loads((golden.folder() / golden.JSON_SCHEMA).read_text(encoding="utf-8"))
FILES = {name: json.loads(data) for name, data in golden.shipped().items() if name != golden.CHECKSUMS}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}


def problems(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with a value, by the keywords that our schema uses; another keyword is an error here."""
    for keyword, rule in schema.items():
        match keyword:
            case "$schema" | "$defs" | "title" | "description" | "additionalProperties":
                continue
            case "$ref":
                yield from problems(value, SCHEMA["$defs"][rule.removeprefix("#/$defs/")], where)
            case "type" if not isinstance(value, TYPES[rule]) or isinstance(value, bool):
                yield f"{where}: {value!r:.40} is no {rule}"
                return
            case "const" if value != rule or type(value) is not type(rule):
                yield f"{where}: {value!r:.40} is not {rule}"
            case "enum" if value not in rule:
                yield f"{where}: {value!r:.40} is none of {rule}"
            case "pattern" if not re.search(rule, value):
                yield f"{where}: {value!r:.40} does not match {rule}"
            case "minimum" if value < rule:
                yield f"{where}: {value} is below {rule}"
            case "maximum" if value > rule:
                yield f"{where}: {value} is above {rule}"
            case "minItems" if len(value) < rule:
                yield f"{where}: too few"
            case "items":
                for i, x in enumerate(value):
                    yield from problems(x, rule, f"{where}/{i}")
            case "required":
                yield from (f"{where}: no {name}" for name in rule if name not in value)
            case "properties":
                others = schema["additionalProperties"]
                for name, x in value.items():
                    if name in rule or others is not False:
                        yield from problems(x, rule.get(name, others), f"{where}/{name}")
                    else:
                        yield f"{where}: {name} is not described"
            case "anyOf":
                if not any(not list(problems(value, option, where)) for option in rule):
                    yield f"{where}: {value!r:.40} is none of what it may be"
            case "type" | "const" | "enum" | "pattern" | "minimum" | "maximum" | "minItems":
                continue
            case _:
                raise AssertionError(f"the schema uses {keyword}, which this test does not know")


@pytest.mark.parametrize("name", FILES)
def test_the_schema_describes_the_files(name: str) -> None:
    assert list(problems(FILES[name], SCHEMA)) == []


def test_another_validator_agrees() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(SCHEMA)
    for content in FILES.values():
        assert list(validator(SCHEMA).iter_errors(content)) == []


def test_the_schema_describes_every_field_that_there_is() -> None:
    """Also by the loader, which reads no field that the schema does not name."""
    case = SCHEMA["$defs"]["case"]["properties"]
    used = {name for content in FILES.values() for given in content["cases"] for name in given}
    assert used == set(case)
    assert {kind.kind for kind in golden.AdaptivitySchedule.__subclasses__()} == set(
        SCHEMA["$defs"]["schedule"]["properties"]["schedule"]["enum"]
    )


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("cases", 0, "groups", 0, "lr"), 0.01, "is none of what it may be"),
        (("cases", 0, "groups", 0, "b1"), "0.9", "does not match"),
        (("cases", 0, "groups", 0, "momentum"), "0x1p-1", "momentum is not described"),
        (("cases", 0, "scope"), "layer", "is none of"),
        (("cases", 0, "expected", 0, "step"), -1, "is below 0"),
        (("cases", 0, "expected", 0, "groups", 0, "step", 0), True, "is no integer"),
        (("cases", 0, "compensated"), False, "is not True"),
        (("cases", 0, "gradients"), [], "too few"),
        (("schema",), 3, "is not 2"),
    ],
)
def test_the_schema_refuses(path: tuple[Any, ...], value: Any, problem: str) -> None:
    content = deepcopy(FILES["basics.json"])
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(problem in found for found in problems(content, SCHEMA))


def test_a_field_that_is_missing_is_refused() -> None:
    content = deepcopy(FILES["basics.json"])
    del content["cases"][0]["expected"]
    assert list(problems(content, SCHEMA)) == ["/cases/0: no expected"]
