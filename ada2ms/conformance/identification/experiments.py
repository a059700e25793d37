"""Designed gradients: each shows something that training seldom shows."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from ada2ms.core.dialects import Array


@dataclass(frozen=True)
class Experiment:
    """Values to begin with, and gradients for each step.

    Attributes:
        params: initial values, in float64.
        gradients: for each step, one for each parameter; None where there is none.
        rates: by what the learning rate is multiplied in each step; None: it stays.
    """

    params: list[Array]
    gradients: list[list[Array | None]]
    rates: tuple[float, ...] | None = None


_MAGNITUDES: Final = (2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -12)  # powers of 10
_SCALES: Final = (1, 0.05, 3, 20, 0.3, 1, 90, 1, 0.1, 2, 1, 1e-4, 5, 1, 0.5, 1)  # of each step: clipping shows
_VALUES: Final = (0.0, 0.5, -1.0, 0.1, -0.02, 2.0, 0.003)
MISSING: Final = (3, 4)  # steps, counted from 0, without a gradient of the second tensor


def main(seed: int = 0) -> Experiment:
    """Magnitudes far apart, with constant, alternating and random signs; zeros, impulses, late starts and ends.

    The first tensor has 64 entries, each a time series of its own; the second lacks gradients in two steps; the third
    is a scalar.
    """
    rng = np.random.default_rng(seed)
    steps = len(_SCALES)
    columns: list[Array] = []
    for sign in ("constant", "alternating", "random", "random"):
        for power in _MAGNITUDES:
            signs = {"constant": np.ones(steps), "alternating": (-1.0) ** np.arange(steps)}
            chosen = signs.get(sign, rng.choice([-1.0, 1.0], steps))
            columns.append(10.0**power * chosen * rng.uniform(0.5, 2.0, steps))
    on = np.arange(steps)
    zero = np.zeros(steps)
    columns += [zero, zero, zero, 3.0 * (on == 0), 1e-4 * (on == 0), 1.0 * (on >= 5), 1.0 * (on < 5), 1e-8 * (on < 5)]
    matrix = (np.stack(columns, axis=1) * np.array(_SCALES)[:, None]).reshape(steps, 8, 8)
    vector = rng.normal(size=(steps, 6)) * np.array(_SCALES)[:, None] * 10.0 ** np.arange(0, -6, -1)
    scalar = rng.normal(size=steps) * np.array(_SCALES)
    values = [np.resize(_VALUES, 64).reshape(8, 8), np.array([0.0, 1.0, -0.5, 0.25, 0.0, 3.0]), np.array(0.5)]
    gradients: list[list[Array | None]] = [
        [matrix[i], None if i in MISSING else vector[i], np.asarray(scalar[i])] for i in range(steps)
    ]
    return Experiment(values, gradients)


def ordinary(steps: int = 40, seed: int = 1, rates: tuple[float, ...] | None = None) -> Experiment:
    """Gradients as of training, longer: what was found must explain them as well."""
    rng = np.random.default_rng(seed)
    shapes: tuple[tuple[int, ...], ...] = ((5, 4), (7,), (2, 3, 2))
    scale = np.exp(rng.normal(size=steps))
    mean = [rng.normal(size=shape) for shape in shapes]
    gradients: list[list[Array | None]] = [[s * (0.3 * mu + rng.normal(size=mu.shape)) for mu in mean] for s in scale]
    return Experiment([rng.normal(size=shape) for shape in shapes], gradients, rates)


RATES: Final = (1.0, 1.0, 2.0, 2.0, 0.5, 3.0, 0.25, 1.0, 1.0, 0.0, 1.0, 1.0)  # a learning rate that moves


def without_missing(experiment: Experiment) -> Experiment:
    """With zeros where a gradient is missing."""
    gradients: list[list[Array | None]] = [
        [np.zeros_like(p) if g is None else g for p, g in zip(experiment.params, step, strict=True)]
        for step in experiment.gradients
    ]
    return Experiment(experiment.params, gradients, experiment.rates)


def of_matrices(experiment: Experiment) -> Experiment:
    """For an optimizer that takes nothing else: vectors are rows, and scalars have one entry."""
    return Experiment(
        [np.atleast_2d(p) for p in experiment.params],
        [[None if g is None else np.atleast_2d(g) for g in step] for step in experiment.gradients],
        experiment.rates,
    )
