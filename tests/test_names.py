"""The one table of names: what the docs, the specification and every backend call the hyperparameters."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from handoff_support import marked

from ada2ms.core import DEFAULTS
from ada2ms.core import spec as specification
from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    NAMES,
    Framework,
)

ROWS = (("lr",), ("b1", "b2"), ("eps",), ("weight_decay",), ("adaptivity",), ("scope",), ("nonfinite",))
ROWS += (("max_norm",), ("compensated",))
FRAMEWORKS: tuple[Framework, ...] = ("torch", "keras", "optax")


def arguments(names: tuple[str, ...], framework: Framework) -> str:
    """As a table has them: what they are called, a tuple once."""
    return ", ".join(dict.fromkeys(NAMES[name][framework].partition("[")[0] for name in names))


def test_the_docs_have_the_names_and_defaults() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rule.md").read_text()
    table = page[page.index("## Names and defaults") :].splitlines()[4 : 4 + len(ROWS)]
    defaults = {**vars(DEFAULTS), "scope": DEFAULT_SCOPE, "nonfinite": DEFAULT_NONFINITE}
    defaults |= {"max_norm": DEFAULT_MAX_NORM, "compensated": DEFAULT_COMPENSATED}
    for names, line in zip(ROWS, table, strict=True):
        _, default, *found = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        assert found == [arguments(names, framework) for framework in FRAMEWORKS]
        given = tuple(defaults[name] for name in names)
        assert (eval(default) if len(given) > 1 else (eval(default),)) == given


def test_the_specification_has_the_names() -> None:
    text = specification.__doc__ or ""
    rows = {tuple(re.split(r"\s{2,}", line.strip())[-3:]) for line in text.splitlines()}
    for names in (*ROWS[:5], ("scope", "nonfinite"), ("max_norm",), ("compensated",)):
        torch = ", ".join(names) + " (torch: betas)" * ("b1" in names)
        assert (torch, arguments(names, "keras"), arguments(names, "optax")) in rows


def optimizer(framework: Framework, **options: Any) -> Any:
    """One of a framework, for one parameter."""
    if framework == "torch":
        torch = importlib.import_module("torch")
        return importlib.import_module("ada2ms.torch").Ada2MS([torch.zeros(2, requires_grad=True)], **options)
    module = importlib.import_module("ada2ms.tf" if framework == "keras" else "ada2ms.jax")
    return (module.Ada2MS if framework == "keras" else module.ada2ms)(**options)


BACKENDS = pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])


@BACKENDS
def test_a_backends_arguments_and_defaults(framework: Framework) -> None:
    module = importlib.import_module({"torch": "ada2ms.torch", "keras": "ada2ms.tf", "optax": "ada2ms.jax"}[framework])
    parameters = inspect.signature(module.ada2ms if framework == "optax" else module.Ada2MS).parameters
    defaults = {**vars(DEFAULTS), "scope": DEFAULT_SCOPE, "nonfinite": DEFAULT_NONFINITE}
    defaults |= {"max_norm": DEFAULT_MAX_NORM, "compensated": DEFAULT_COMPENSATED}
    for name, default in defaults.items():
        argument, indexed, index = NAMES[name][framework].partition("[")
        found = parameters[argument].default
        assert (found[int(index[:-1])] if indexed else found) == default


@BACKENDS
@pytest.mark.parametrize("name", NAMES)
def test_an_error_names_the_backends_argument(framework: Framework, name: str) -> None:
    argument, indexed, index = NAMES[name][framework].partition("[")
    value: Any = "layer" if name in ("scope", "nonfinite", "compensated") else -1.0
    if indexed:
        value = tuple(value if i == int(index[:-1]) else 0.5 for i in range(2))
    with pytest.raises(ValueError, match=re.escape(f"({NAMES[name][framework]} must be ")):
        optimizer(framework, **{argument: value})
