"""What an optimizer did in an experiment: the update of every entry in every step."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from ada2ms.conformance.identification.experiments import Experiment
from ada2ms.conformance.identification.subject import CannotRunError, Subject, values
from ada2ms.core.dialects import Array, Hyper, rounded

GRAIN: Final = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass
class Run:
    """A record of an experiment.

    Attributes:
        dtype: of the parameters.
        gradients: as the optimizer got them, by tensor and step.
        values: before each step, by tensor and step.
        updates: by tensor and step.
        last: the values after the last step.
        means: the mean square of the gradient in each step, over the model.
        norms: its norm.
        hyper: of each step: the learning rate, if it is told.
        relative: what arithmetic may be off by, of an update.
    """

    dtype: str
    gradients: list[list[Array | None]]
    values: list[list[Array]]
    updates: list[list[Array]]
    last: list[Array]
    means: list[float]
    norms: list[float]
    hyper: list[Hyper]
    relative: float
    _flat: dict[int, tuple[Array, Array, Array, Array]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.updates[0])

    def flat(self, tensor: int) -> tuple[Array, Array, Array, Array]:
        """Updates, values, their scale and what rounding explains, each of shape (steps, entries)."""
        if tensor not in self._flat:
            u = np.stack([x.reshape(-1) for x in self.updates[tensor]])
            x = np.stack([x.reshape(-1) for x in self.values[tensor]])
            before = 1.0 if self.relative > 1e-6 else 0.1  # float32 keeps what larger updates have left of rounding
            scale = np.maximum(np.abs(u), before * np.maximum.accumulate(np.abs(u), axis=0))
            tolerance = self.relative * scale + 2 * GRAIN[self.dtype] * (np.abs(x) + np.abs(u)) + 1e-200
            self._flat[tensor] = u, x, scale + tolerance, tolerance
        return self._flat[tensor]

    def allowing(self, relative: float) -> "Run":
        """The same, where arithmetic may be off by more, or by less."""
        return replace(self, relative=relative, _flat={})

    def at(self, rates: Sequence[float]) -> "Run":
        """The same, with these learning rates."""
        hyper = [{**given, "lr": rate} for given, rate in zip(self.hyper, rates, strict=True)]
        return replace(self, hyper=hyper)


def observe(subject: Subject, experiment: Experiment, dtype: str, relative: float, **hyper: float) -> Run:
    """Steps an optimizer by an experiment.

    Raises:
        CannotRunError: it raises, or its parameters become other than finite.
    """

    def kept(x: Array) -> Array:
        return np.asarray(x.astype(np.float32).astype(np.float64) if dtype == "float32" else rounded(x, dtype))

    initial = [np.asarray(kept(p)) for p in experiment.params]
    given = [[None if g is None else np.asarray(kept(g)) for g in step] for step in experiment.gradients]
    try:
        with subject.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gradients that are missing, which is meant here
            optimizer = subject.make([p.copy() for p in initial], dtype, **hyper)
            record = [values(optimizer.params)]
            lr = float(optimizer.lr) if experiment.rates else 0.0
            for i, gradients in enumerate(given):
                if experiment.rates:
                    optimizer.lr = lr * experiment.rates[i]
                optimizer.step([None if g is None else g.copy() for g in gradients])
                record.append(values(optimizer.params))
    except Exception as error:  # whatever an optimizer raises is what there is to say of it
        said = str(error).strip().partition("\n")[0]
        raise CannotRunError(f"{subject.name} raised {type(error).__name__}: {said}") from error
    if len(record[0]) != len(initial):
        raise CannotRunError(
            f"{subject.name} has {len(record[0])} parameters (must be {len(initial)}, as it was given)"
        )
    if not all(np.all(np.isfinite(x)) for step in record for x in step):
        raise CannotRunError(f"{subject.name} makes parameters that are not finite, in {dtype}")
    return _record(subject, experiment, dtype, relative, given, record, hyper)


def _record(
    subject: Subject,
    experiment: Experiment,
    dtype: str,
    relative: float,
    given: list[list[Array | None]],
    record: list[list[Array]],
    hyper: Hyper,
) -> Run:
    steps, tensors = len(given), len(record[0])
    means, norms = [], []
    for gradients in given:
        there = [g for g in gradients if g is not None]
        total = sum(float(np.sum(g * g)) for g in there)
        means.append(total / max(sum(g.size for g in there), 1))
        norms.append(total**0.5)
    lr = hyper.get("lr", subject.told.get("lr"))
    rates = [subject.schedule(i) if subject.schedule else lr for i in range(steps)]
    factors = experiment.rates or (1.0,) * steps
    return Run(
        dtype,
        [[given[i][k] for i in range(steps)] for k in range(tensors)],
        [[record[i][k] for i in range(steps)] for k in range(tensors)],
        [[record[i + 1][k] - record[i][k] for i in range(steps)] for k in range(tensors)],
        record[-1],
        means,
        norms,
        [{} if rate is None else {"lr": rate * factor} for rate, factor in zip(rates, factors, strict=True)],
        relative,
    )
