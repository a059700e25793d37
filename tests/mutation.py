"""Wrong variants of the rule: how they are made of spec.py, and how the golden cases reject them."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

import support
from ada2ms.conformance.rule import optimizer_of
from ada2ms.core import golden, spec
from ada2ms.core.spec import widen


@dataclass(frozen=True)
class Mutant:
    name: str
    case: str  # the golden case that must reject it
    edits: tuple[tuple[str, str], ...]  # pieces of spec.py, each found there once, and what they become


def mutate(*edits: tuple[str, str]) -> ModuleType:
    """spec.py with each piece replaced; without edits, the rule itself."""
    source = inspect.getsource(spec)
    for old, new in edits:
        assert source.count(old) == 1, f"spec.py has changed: this mutant needs a new edit in place of {old!r}"
        source = source.replace(old, new)
    module = ModuleType("mutant")
    exec(compile(source, "mutant of spec.py", "exec"), module.__dict__)
    return module


def replay(module: ModuleType, case: golden.Case, dtype: str) -> Iterator[support.Snapshot]:
    """Replays a case, with the learning rate as a schedule of completed updates.

    Only parameters and compensations are the variant's own: it must be rejected by what it does to them. The state is
    the expected one.
    """
    optimizer = optimizer_of(module, case, dtype)
    for group, given in zip(optimizer.groups, case.groups, strict=True):
        lr = {"lr": lambda count, lr=given.lr: lr[min(count, len(lr) - 1)]}
        group.hyper = module.Hyperparameters(**{**vars(group.hyper), **lr})
    recorded = {at.step: support.expected(at) for at in case.expected}
    for step, gradients in enumerate(case.gradients, start=1):
        with np.errstate(all="ignore"):
            optimizer.step([None if g is None else g.astype(dtype) for g in gradients])
        at = recorded.get(step, support.expected(case.expected[0]))
        at.params = [widen(p).astype(np.float64) for group in optimizer.groups for p in group.params]
        at.compensation = [None if x is None else widen(x) for group in optimizer.groups for x in group.compensation]
        yield at


def rejection(module: ModuleType, case: golden.Case) -> str | None:
    """How the case rejects a variant that computes in float64; None if it does not.

    The bounds are those for float32, about a million times wider than those for float64: a variant that they reject is
    told from the rule in either precision, and by far more than rounding.
    """
    try:
        support.check(case, replay(module, case, support.precisions(case)[0]), "float32")
    except AssertionError as error:
        return str(error).partition("\n")[0]
    return None


UPDATE_CALL = "update(group, [next(remaining) for _ in group.params], c, mean(c * total * c, numel))"
IN_STEP = "        "  # the indentation of the body of Ada2MS.step

MUTANTS: list[Mutant] = []


def mutant(name: str, case: str, *edits: tuple[str, str]) -> None:
    MUTANTS.append(Mutant(name, case, edits))


def show() -> None:
    """Prints, for each variant, every case that rejects it."""
    for variant in MUTANTS:
        module = mutate(*variant.edits)
        rejecting = [case.id for case in golden.load() if rejection(module, case)]
        print(f"{variant.name}: rejected by {len(rejecting)} of {len(golden.load())} cases", *rejecting, sep="\n    ")
