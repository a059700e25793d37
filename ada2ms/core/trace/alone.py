"""One run alone: whether its updates follow from its gradients by the rule that its optimizer claims."""

from ada2ms.core.dialects import base
from ada2ms.core.trace.explain import Fit, explain, series, spoken
from ada2ms.core.trace.model import Trace
from ada2ms.core.trace.verdict import Verdict


def judge(trace: Trace) -> Verdict:
    """Acquits or convicts the optimizer of a run.

    The first steps, of which entries are recorded, are compared with what every dialect of the catalogue would have
    done with the same gradients. "Only rounding" then means: the updates are those of the optimizer's own rule.
    """
    run = series(trace)
    if not run:
        why = "the optimizer had been used before" if trace.about.get("started") else "no entries were recorded"
        look = ["record from the first step of a new optimizer, with full=3 or more"]
        return Verdict("cannot tell", f"there is nothing to judge by: {why}", look=look)
    hyper = run[0].hyper[0]
    name = str(trace.about.get("optimizer", "the optimizer"))
    own = base(name, hyper)
    found = explain(trace)
    assert found is not None
    rate = _rates(found, "lr" in hyper)
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    said = f"{name}'s updates in {steps} are those of {spoken(found)}, to {found.deviation:.1e}"
    if not found.fits:
        cause = f"the updates of {name} are none of the catalogue's"
        evidence = [f"the nearest is {spoken(found)}, and {found.deviation:.1e} of an update is left", *rate]
        return Verdict("cannot tell", cause, evidence=evidence, look=["clipping and other wrappers of the optimizer"])
    differences = own.differences(found.dialect, hyper, hyper)
    at = _first_odd(found) if "lr" in hyper else 0
    if not differences and not at:
        return Verdict("only rounding", said, evidence=rate, notes=_few(found))
    if at:
        differences.append(
            f"from step {at} on the updates are {found.factors[at - 1]:.4g} of the rule's: the learning rate?"
        )
    cause = f"{name} does not compute {spoken(Fit(own, 0, 0, 1, [], 0))}: " + "; ".join(differences)
    kinds = [key for key in vars(own) if getattr(own, key) != getattr(found.dialect, key)] or ["lr"]
    return Verdict("parted", cause, "update", at or 1, kinds[0], [said, *rate], look=["the optimizer and its wrappers"])


def _first_odd(found: Fit) -> int:
    """The first step whose update is not of the size that its learning rate gives; 0 if there is none."""
    return next((i + 1 for i, c in enumerate(found.factors) if abs(c - 1) > 1e-3), 0)


def _rates(found: Fit, told: bool) -> list[str]:
    if told:
        return []
    return [f"no learning rate was told; the updates show {', '.join(f'{c:.6g}' for c in found.factors)}"]


def _few(found: Fit) -> list[str]:
    return ["one step tells little: the decay rates show from the second on"] if found.steps < 2 else []
