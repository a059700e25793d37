"""Rules that are near another one: what a port most likely computes differs from the original in one thing.

So a run that its own rule does not explain is asked first by the other run's rule, and by those that differ from it in
one thing; and of several rules that explain it, the one that has most in common with the other run's is told.
"""

from collections.abc import Iterator
from dataclasses import replace

from ada2ms.core.dialects import DEFAULTS, Dialect, Hyper, variants
from ada2ms.core.trace.explain import Fit, fit
from ada2ms.core.trace.numbers import decays
from ada2ms.core.trace.series import Series


def near(rule: Dialect, run: list[Series]) -> Fit | None:
    """The first rule that explains a run, of those that differ from another one in at most one thing; None if none.

    Args:
        rule: with all its hyperparameters; of these, what was told of the run itself goes before.
        run: of `series`, not empty.
    """
    hyper = run[0].hyper[0]
    start = replace(rule, changed=tuple(pair for pair in rule.changed if pair[0] not in hyper))
    for dialect in _candidates(start, run, hyper):
        if (found := fit(dialect, run)).fits:
            return _short(found, hyper)
    return None


def _candidates(rule: Dialect, run: list[Series], hyper: Hyper) -> Iterator[Dialect]:
    yield rule
    told = "weight_decay" in hyper
    for decay in () if told else dict.fromkeys((rule.decay, "decoupled", "unscaled")):
        yield from decays(replace(rule, decay=decay), run)
    yield from variants(rule, hyper)


def nearest(found: Fit, run: list[Series], rule: Dialect) -> Fit:
    """The same fit, with as much of another rule as still explains the run: what makes no difference is none.

    Args:
        found: a rule that explains the run.
        run: what it explains.
        rule: the other one, with all its hyperparameters.
    """
    told = run[0].hyper[0]
    for name in vars(rule):
        if name != "changed" and getattr(found.dialect, name) != getattr(rule, name):
            found = _if_it_fits(found, replace(found.dialect, **{name: getattr(rule, name)}), run)
    for name, value in rule.changed:
        now = dict(found.dialect.changed)
        if now.get(name, told.get(name, DEFAULTS[name])) != value and name not in told:
            changed = tuple(sorted({**now, name: value}.items()))
            found = _if_it_fits(found, replace(found.dialect, changed=changed), run)
    return _short(found, told)


def _short(found: Fit, told: Hyper) -> Fit:
    """The same, without hyperparameters that are as they were told, or as they are by default."""
    changed = tuple(pair for pair in found.dialect.changed if told.get(pair[0], DEFAULTS[pair[0]]) != pair[1])
    return replace(found, dialect=replace(found.dialect, changed=changed))


def _if_it_fits(found: Fit, dialect: Dialect, run: list[Series]) -> Fit:
    other = fit(dialect, run, free=found.free)
    return other if other.fits else found
