"""From what differs to why: names for common causes of differing values, losses and gradients."""

import math
from typing import Final

import numpy as np

from ada2ms.core.trace import sums
from ada2ms.core.trace.model import Step
from ada2ms.core.trace.pair import RESIDUE, Pair, factor, grain, relative
from ada2ms.core.trace.sketch import Array
from ada2ms.core.trace.verdict import STAGES, Verdict, some

_LEVEL: Final = 16.0  # roundings of a loss: correct ports are a few apart, a slightly different function more
_COHERENT: Final = 3.0  # of `Pair.coherence`, above which a difference is no noise
_ALIKE: Final = 2e-5  # relatively, norms that are clipped to one bound; torch adds 1e-6
_REDUCTION: Final = "the reduction of the loss: mean or sum, over what, and weights of samples"
_FORWARD: Final = (
    "what the forward pass computes: activations, normalisation (epsilon, eval mode), positions and masks, labels and "
    "weights in the loss",
    "randomness: dropout, augmentation (a second recording of A says whether A repeats itself)",
)
_CUT: Final = "detach, stop_gradient and frozen layers between these parameters and the loss"
_NOISY: Final = 0.3  # the largest share of a gradient that arithmetic of 16 bits is held to explain
_PRECISIONS: Final = (("bfloat16", 2.0**-8), ("TF32 or float16", 2.0**-11))


def between(pair: Pair, i: int, changed: list[Array]) -> Verdict:
    """Values that something else than the optimizer has changed since the last step."""
    sides = [k for k, each in enumerate(changed) if each.any()]
    who = "both runs" if len(sides) == 2 else "AB"[sides[0]]
    names = [pair.names[k] for k in np.flatnonzero(changed[sides[0]] | changed[sides[-1]])]
    cause = f"between steps {i} and {i + 1} something else than the optimizer changed values in {who}: {some(names)}"
    look = [
        "what writes to parameters besides the optimizer: constraints, averages, weight norms, a state that is loaded"
    ]
    return Verdict("parted", cause, "value", i + 1, "changed outside", look=look, parameters=names)


def loss_and_gradient(pair: Pair, i: int, bad: Array, allowed: float, loss_differs: bool) -> list[Verdict]:
    """Other losses or gradients from the same values and data: all that is seen, the first stage first."""
    gone_a, gone_b = pair.missing(i)
    gone = gone_a != gone_b
    if cause := _not_finite(pair, i):
        look = ["overflow in 16 bits, a division by 0, a logarithm of 0; what the batch of this step holds"]
        stage = "forward" if loss_differs else "gradient"
        evidence = [f"{who} leaves out this step" for who, s in zip("AB", pair.steps[i], strict=True) if s.skipped]
        return [Verdict("parted", cause, stage, i + 1, "not finite", evidence, look=look)]
    ga, gb = pair.sketches("gradient", i)
    zero = bad & ~gone & ((ga[:, 0] == 0) != (gb[:, 0] == 0))
    found = []
    if (bad & ~gone & ~zero).any():
        found.append(_others(pair, i, bad & ~gone & ~zero, ~gone_a & ~gone_b & ~zero, allowed, loss_differs))
    if loss_differs and not (found and found[0].stage == "forward"):
        found.append(_loss(pair, i, alone=not bad.any()))
    reasons = []
    if zero.any() and not (loss_differs and found and found[0].kind in ("everything", "some gradients", "precision")):
        reasons.append(_zeros(pair, i, zero))
    if gone.any():
        reasons.append(missing(pair, i, gone_a, gone_b))
    follows = bool(found) and found[0].kind in ("everything", "some gradients", "clipped alike")
    return sorted(reasons + found if follows else found + reasons, key=lambda verdict: STAGES.index(verdict.stage))


def _others(pair: Pair, i: int, bad: Array, use: Array, allowed: float, loss_differs: bool) -> Verdict:
    """Of the gradients that both runs have, what differs: not none.

    Args:
        pair: the traces.
        i: the step.
        bad: which gradients differ.
        use: which both have.
        allowed: how far apart rounding puts gradients.
        loss_differs: whether losses do, too.
    """
    stage = "forward" if loss_differs else "gradient"
    names = [pair.names[k] for k in np.flatnonzero(bad)]
    ga, gb = pair.sketches("gradient", i)
    c, left = factor(ga[use], gb[use])
    near = 3 * (allowed + pair.yardstick.sketch)  # by how much sketches of the same gradients differ, and some
    if left <= near and abs(c - 1) > max(allowed, 3 * left):
        return _scaled(pair, i, c, left, near, loss_differs)
    each = {pair.names[k]: factor(ga[k], gb[k]) for k in np.flatnonzero(bad)}
    common = {name: c for name, (c, left) in each.items() if left <= near}
    one = len(common) == len(names) and max(common.values()) <= (1 + 2 * near) * min(common.values())
    if len(bad) > len(names) and one and abs(next(iter(common.values())) - 1) > near:
        c = next(iter(common.values()))
        cause = f"the gradients of {some(names)} are {c:.6g} times those of A; all others agree"
        look = ["parameters that are used twice (tied), or whose gradient is scaled by a layer of its own"]
        return Verdict("parted", cause, stage, i + 1, "factor of some", look=look, parameters=names)
    found = sums.mixture(pair, i, bad, near, stage) or sums.clipped(pair, i, bad, common, stage, allowed)
    found = found or sums.tied(pair, i, bad, near, stage)
    return found or _precision(pair, i, stage, left, allowed, names) or _everything(pair, i, bad, stage, names)


def _zeros(pair: Pair, i: int, zero: Array) -> Verdict:
    names = [pair.names[k] for k in np.flatnonzero(zero)]
    side = "A" if pair.sketches("gradient", i)[0][np.flatnonzero(zero)[0], 0] == 0 else "B"
    cause = f"the gradients of {some(names)} are 0 in {side} alone"
    look = ["layers that are frozen, detached or not used", "stop_gradient and detach"]
    return Verdict("parted", cause, "gradient", i + 1, "zero gradients", look=look, parameters=names)


def _precision(pair: Pair, i: int, stage: str, left: float, allowed: float, names: list[str]) -> Verdict | None:
    """Arithmetic of fewer bits in one run, if that is the matter."""
    look = [
        "the precision of matrix products (TF32, bfloat16, autocast, mixed_precision)",
        "functions by an approximation, such as GELU by tanh",
    ]
    if pair.seen[0] != pair.seen[1] and left < _NOISY:
        side = int(not pair.seen[0])
        held = pair.held[side]
        matrices = [name for name, k in zip(pair.names, pair.ia, strict=True) if len(pair.a.parameters[k].shape) > 1]
        where = "" if len(held) == len(matrices) else f" of {some(held)}"
        cause = (
            f"{'AB'[side]} computes in {pair.seen[side]}: of that are the numbers that its gradients{where} hold; they "
            f"differ by {left:.1e}"
        )
        return Verdict("parted", cause, stage, i + 1, "precision", look=look, parameters=names)
    x, y = (step.loss for step in pair.steps[i])
    if (
        not 0 < pair.coherence(i) < _COHERENT or relative(x, y) > left
    ):  # a loss is a mean, of which rounding leaves less
        return None
    look.append(f"or {_FORWARD[0]}")
    for name, size in _PRECISIONS:
        if size / 30 < left < size * 4 and allowed < size / 30:
            cause = f"all differ without direction, by what arithmetic of {name} would leave: {left:.1e}"
            return Verdict("parted", cause, stage, i + 1, "precision", look=look, parameters=names)
    return None


def _not_finite(pair: Pair, i: int) -> str:
    """What is not finite in one run alone, as a sentence: its loss, else gradients; empty if nothing is."""
    x, y = (step.loss for step in pair.steps[i])
    if x is not None and y is not None and math.isfinite(x) != math.isfinite(y):
        return f"the loss of {'A' if math.isfinite(y) else 'B'} is not finite"
    broken = pair.broken(i)
    found = []
    for who, here, there in zip("AB", broken, reversed(broken), strict=True):
        names = [pair.names[k] for k in np.flatnonzero(here & ~there)]
        whose = "" if len(names) == len(pair.names) else f" {some(names)} in"
        found += [f"gradients of{whose} {who} are not finite"] if names else []
    return "; ".join(found)


def missing(pair: Pair, i: int, gone_a: Array, gone_b: Array) -> Verdict:
    """Gradients that only one run has."""
    names = [pair.names[k] for k in np.flatnonzero(gone_a != gone_b)]
    side = "A" if gone_a[pair.names.index(names[0])] else "B"
    cause = f"{some(names)} have no gradient in {side}"
    look = [f"whether they are frozen in {side}, used in its forward pass, and given to its optimizer"]
    return Verdict("parted", cause, "gradient", i + 1, "missing gradients", look=look, parameters=names)


def _loss(pair: Pair, i: int, *, alone: bool) -> Verdict:
    """Another loss; `alone`: and no gradient of which that may be the reason."""
    x, y = pair.steps[i]
    assert x.loss is not None
    assert y.loss is not None
    ratio, difference = y.loss / x.loss if x.loss else math.inf, y.loss - x.loss
    cause = f"the loss that was told differs ({x.loss:.6g} against {y.loss:.6g})"
    cause = f"only {cause}; all gradients agree" if alone else cause
    if alone and all(_is_clipped(pair, i, side) for side in (0, 1)):
        norm = f"{_whole(x):.4g}"
        cause += f", but both are clipped to the norm {norm}, and a factor before that does not show"
        cause += _factors(ratio, x, y)
    look = [
        f"what the loss is divided by (the ratio is {ratio:.6g}): mean or sum, over what",
        f"terms without a gradient, or a penalty that is only reported (the difference is {difference:.6g})",
    ]
    return Verdict("parted", cause, "forward", i + 1, "only the loss" if alone else "loss", look=look)


def _scaled(pair: Pair, i: int, c: float, left: float, near: float, loss_differs: bool) -> Verdict:
    """All gradients by one factor."""
    x, y = pair.steps[i]
    ratio = y.loss / x.loss if x.loss and y.loss else None
    evidence = [f"all gradients of B are {c:.7g} times those of A, and {left:.1e} of them is left"]
    if ratio is not None:
        evidence.append(f"the loss of B is {ratio:.7g} times that of A")
    if loss_differs and ratio is not None and relative(ratio, c) <= near:
        names = _factors(c, x, y)
        cause = f"loss and gradients of B are {c:.6g} times those of A{names}: another reduction"
        return Verdict("parted", cause, "forward", i + 1, "reduction", evidence, look=[_REDUCTION])
    norms = [_whole(s) for s in (x, y)]
    small, large = (0, 1) if norms[0] < norms[1] else (1, 0)
    clips = [_is_clipped(pair, i, side) for side in (0, 1)]
    if loss_differs and ratio is not None:
        hidden = " and ".join(f"{'AB'[k]}'s are clipped to the norm {norms[k]:.4g}" for k in (0, 1) if clips[k])
        names = _factors(ratio, x, y)
        kind = "reduction" if hidden or names else "factors"  # by chance: a single number's gradients always have one
        cause = f"the loss of B is {ratio:.6g} times that of A, gradients are {c:.6g} times those of A"
        cause += f", where {hidden}" * bool(hidden) + (names or ": another reduction" * bool(hidden))
        return Verdict("parted", cause, "forward", i + 1, kind, evidence, look=[_REDUCTION])
    if all(clips) and relative(*norms) < _ALIKE:
        cause = f"the other gradients of B are {c:.6g} times those of A: both clip to the norm {norms[0]:.4g} of all"
        return Verdict("parted", cause, "gradient", i + 1, "clipped alike", evidence)
    if clips[small]:
        return _clipped(pair, i, norms, clips, evidence)
    cause = f"all gradients of B are {c:.6g} times those of A{_factors(c, x, y)}"
    look = [
        "how losses are summed over batches, devices and accumulated steps",
        "a loss scale that is not taken out" + ", or only after gradients are clipped" * clips[large],
    ]
    if clips[large]:
        evidence.append(
            f"the gradients of {'AB'[large]} are clipped to the norm {norms[large]:.4g}: before that the factor is "
            "larger, and where both are clipped it does not show"
        )
    return Verdict("parted", cause, "gradient", i + 1, "factor", evidence, look=look)


def _clipped(pair: Pair, i: int, norms: list[float], clips: list[bool], evidence: list[str]) -> Verdict:
    """Gradients that are clipped in the run where they are smaller, and not or to another norm in the other."""
    small, large = (0, 1) if norms[0] < norms[1] else (1, 0)
    other = f"to {norms[large]:.4g}" if clips[large] else "not"
    cause = f"the gradients of {'AB'[small]} are clipped to the norm {norms[small]:.4g}, those of {'AB'[large]} {other}"
    alone = f"{'AB'[small]} clips before the optimizer ({norms[large]:.4g} unclipped)"
    look = [f"gradient clipping: {'the norm to which each clips' if clips[large] else alone}"]
    if not clips[large] and (pair.a, pair.b)[large].about.get("framework") == "jax":
        look.append("where `recorded` is: if it is around the clipping too, put it within, around the rule alone")
    return Verdict("parted", cause, "gradient", i + 1, "clipping", evidence, look=look)


def _whole(step: Step) -> float:
    """The norm of a step's gradient over the model."""
    return math.sqrt(float(np.nansum(np.square(step.sketches["gradient"][:, 0]))))


def _is_clipped(pair: Pair, i: int, side: int) -> bool:
    """Whether a run's norm is a round number that it does not exceed in the next steps."""
    norms = [_whole(steps[side]) for steps in pair.steps[i : i + 8]]
    rounded = float(f"{norms[0]:.2g}")
    return math.isclose(norms[0], rounded, rel_tol=_ALIKE) and max(norms) <= rounded * (1 + _ALIKE)


def _factors(c: float, x: Step, y: Step) -> str:
    """What a factor may come from."""
    names: list[str] = []
    for r, way in ((c, ""), (1 / c if c else math.inf, "1/")):
        whole = round(r)
        if not math.isclose(r, whole, rel_tol=1e-4) or whole < 2:
            continue
        sizes = {int(b[0][1]) for s in (x, y) for b in s.batches if b}
        counts = {len(s.batches) for s in (x, y)}
        scales = {s.extra.get("loss_scale") for s in (x, y)}
        if whole in sizes:
            names.append(f"{way}the batch's {whole} samples")
        if whole in counts:
            names.append(f"{way}the {whole} batches that are accumulated")
        if float(whole) in scales or (whole & (whole - 1) == 0 and whole >= 256):
            names.append(f"{way}a loss scale of {whole}")
        if not names:
            names.append(f"{way}{whole}: a number of devices, or of batches that are accumulated")
    return f" ({'; or '.join(names)})" if names else ""


def _everything(pair: Pair, i: int, bad: Array, stage: str, names: list[str]) -> Verdict:
    gone = np.logical_or(*pair.missing(i)) | np.logical_xor(*(g[:, 0] == 0 for g in pair.sketches("gradient", i)))
    _, norm, _ = pair.apart("gradient", i)
    telling = ~gone & (norm > RESIDUE * np.max(norm))  # such as not of a bias that a normalisation takes out again
    if bad[telling].all():
        return _all_differ(pair, i, stage, names, others=bool(gone.any()))
    order = [pair.names[k] for k in np.flatnonzero(bad)]
    where = [sentence for k in np.flatnonzero(bad)[:3] if (sentence := sums.place(pair, i, k))]
    good = [pair.names[k] for k in np.flatnonzero(~bad & telling)]
    cause = f"the gradients of {some(order)} differ, those of {some(good, 2)} agree"
    look = [f"the layers of {some(order)}, what lies between them and those that agree"]
    return Verdict("parted", cause, stage, i + 1, "some gradients", where, look=look, parameters=order)


def _all_differ(pair: Pair, i: int, stage: str, names: list[str], *, others: bool) -> Verdict:
    """Without any pattern: all that both runs have.

    Args:
        pair: the traces.
        i: the step.
        stage: "forward" if losses differ by more than rounding explains.
        names: of the parameters.
        others: whether there are gradients besides, which one run alone has.
    """
    x, y = (step.loss for step in pair.steps[i])
    backward = ["the last layers' backward pass, and what happens to gradients before the optimizer gets them"]
    every = "the other gradients" if others else "all gradients"
    if stage == "forward":
        cause, look = f"loss and {every} differ", [*_FORWARD]
    elif relative(x, y) > _LEVEL * max(grain(x), grain(y)):
        stage = "forward"
        cause = f"{every} differ, and the loss by little ({relative(x, y):.1e})"
        look = ["a small difference in the forward pass: a normalisation's epsilon, GELU by tanh or by erf", *_FORWARD]
    else:
        cause, look = f"{every} differ, and the loss does not", [_CUT] if others else backward
    return Verdict("parted", cause, stage, i + 1, "everything", look=look, parameters=names)


def sizes(pair: Pair, what: str, i: int, bad: Array) -> list[str]:
    """How far the worst parameters are apart, relative to their norm."""
    d, norm, whole = pair.apart(what, i)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(~np.isfinite(d), np.inf, np.where(norm > 0, d / norm, np.where(d > 0, np.inf, 0.0)))
    worst = sorted(np.flatnonzero(bad), key=lambda k: -share[k])[:3]
    each = ", ".join(f"{pair.names[k]} {share[k]:.1e}" for k in worst)
    return [
        f"{what} of {int(bad.sum())} of {len(bad)} parameters part, {whole:.1e} of the model's norm"
        + (f"; most: {each}" if each else "")
    ]
