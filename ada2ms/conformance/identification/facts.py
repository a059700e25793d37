"""What is seen of an optimizer without any dialect: what depends on what."""

import numpy as np

from ada2ms.conformance.identification.experiments import Experiment
from ada2ms.conformance.identification.run import Run, observe
from ada2ms.conformance.identification.subject import CannotRunError, Subject
from ada2ms.core.dialects import Array

_STEPS = 3


def facts(subject: Subject, dtype: str) -> list[str]:
    """Whether an entry's update depends on other entries, other tensors and values, and how on the gradient's size."""
    rng = np.random.default_rng(3)
    params = [rng.normal(size=(4, 3)), rng.normal(size=(1, 5))]
    gradients = [[rng.normal(size=p.shape) for p in params] for _ in range(_STEPS)]
    try:
        plain = _run(subject, dtype, params, gradients)
        one = [[g.copy() for g in step] for step in gradients]
        for step in one:
            step[0][0, 0] *= -3.0
        nudged = _run(subject, dtype, params, one)
        doubled = _run(subject, dtype, params, [[2 * g for g in step] for step in gradients])
        shifted = _run(
            subject, dtype, [p.copy() + (np.arange(p.size).reshape(p.shape) == 0) for p in params], gradients
        )
        again = _run(subject, dtype, params, gradients)
    except CannotRunError as reason:
        return [str(reason)]
    found = []
    if not _alike(plain, again, 1e-12):
        return ["two runs by the same gradients differ: it draws random numbers"]
    first = [np.abs(np.stack(a) - np.stack(b)) for a, b in zip(plain.updates, nudged.updates, strict=True)]
    sizes = [np.abs(np.stack(a)) for a in plain.updates]
    rest = first[0].copy()
    rest[:, 0, 0] = 0.0
    own = bool(np.any(rest > 1e-5 * sizes[0].mean()))
    others = bool(np.any(first[1] > 1e-5 * sizes[1].mean()))
    if own:
        found.append("not elementwise: an entry's update depends on the gradients of other entries of its tensor")
    if others:
        found.append("an entry's update depends on the gradients of other tensors")
    if not own and not others:
        found.append("elementwise: an entry's update depends on its own gradients alone")
    ratio = float(np.median(np.abs(doubled.updates[0][0]) / np.maximum(np.abs(plain.updates[0][0]), 1e-300)))
    found.append(f"twice the gradients give {ratio:.3g} times the first update")
    moved = [np.abs(np.stack(a) - np.stack(b)) for a, b in zip(plain.updates, shifted.updates, strict=True)]
    beyond = moved[0].copy()
    beyond[:, 0, 0] = 0.0
    if np.any(beyond > 1e-5 * sizes[0].mean()):
        found.append("an entry's update depends on the values of other entries")
    elif np.any(moved[0] > 1e-5 * sizes[0].mean()):
        found.append("an entry's update depends on its value")
    return found + _decay(subject, dtype)


def _decay(subject: Subject, dtype: str) -> list[str]:
    """What a first step with a gradient of 0 does to values: all that moves them there is decay."""
    hyper = {"weight_decay": 0.1} if "weight_decay" in subject.settable else {}
    start = np.array([[4.0, -2.0, 1.0, -0.5]])
    try:
        run = observe(subject, Experiment([start], [[np.zeros_like(start)]]), dtype, 0.0, **hyper)
    except CannotRunError:
        return []
    taken = -run.updates[0][0] / start
    given = " with weight_decay=0.1" if hyper else ""
    if not np.any(np.abs(taken) > 1e-9):
        return [f"a first gradient of 0 moves nothing{given}"] if hyper else []
    if np.ptp(taken) < 0.02 * np.max(np.abs(taken)):
        return [f"decay is decoupled: a first gradient of 0 takes {np.median(taken):.3g} of every value{given}"]
    return [f"decay is coupled: a first gradient of 0 does not take the same part of every value{given}"]


def _run(subject: Subject, dtype: str, params: list[Array], gradients: list[list[Array]]) -> Run:
    return observe(subject, Experiment(params, [list(step) for step in gradients]), dtype, 1e-9)


def _alike(a: Run, b: Run, within: float) -> bool:
    return all(np.allclose(x, y, rtol=within, atol=1e-300) for x, y in zip(a.last, b.last, strict=True))
