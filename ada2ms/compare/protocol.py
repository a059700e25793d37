"""The protocol: which runs a comparison consists of, and in which order. Read this first.

For every task and every optimizer, the same, in three stages:

    rate    the learning rate is searched on a grid around the optimizer's usual one, at a middling weight decay
    decay   the weight decay is searched at the best rate
    test    the best rate and decay, once for each of several seeds that had no part in the search

The first two stages look at the validation split alone, and use one seed. A seed stands for initial weights and order
of the batches, the same for every optimizer. The best is the one of the highest validation accuracy, and of the lowest
validation loss among equals. Grids have as many points, equally far apart, for every optimizer. Everything else is the
same for all: model, batch size, number of steps, a linear warm-up over the first twentieth of the steps and half a
cosine down to a hundredth of the peak, no decay on biases, norms and embeddings of positions, no clipping.

`study.py` has the stricter protocol by which the default adaptivity is chosen: it is this one with more seeds and a
second, finer grid of rates.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Final, Literal

from torch import nn

from ada2ms.compare import models
from ada2ms.compare.data import Data
from ada2ms.compare.optimizers import CANDIDATES, OPTIMIZERS

Stage = Literal["rate", "decay", "test"]
Record = dict[str, Any]
Records = Mapping[str, Record]

TUNING_SEED: Final = 0


@dataclass(frozen=True)
class Task:
    """A network on a data set.

    Attributes:
        data: name of the data set.
        model: makes the network for it.
        steps: number of batches to train on.
        visual: whether it is one of the tasks that adaptivity is chosen by.
    """

    data: str
    model: Callable[[Data], nn.Module]
    steps: int
    visual: bool = True


def _channels(data: Data) -> int:
    return int(data.train[0].shape[1])


def _side(data: Data) -> int:
    return int(data.train[0].shape[2])


TASKS: Final = {
    "digits, ResNet-20": Task("digits", lambda d: models.ResNet(_channels(d), d.classes, 8), 300),
    "glyphs, ResNet-20": Task("glyphs", lambda d: models.ResNet(_channels(d), d.classes, 8), 300),
    "glyphs, ConvNeXt": Task("glyphs", lambda d: models.ConvNeXt(_channels(d), d.classes, 16), 500),
    "glyphs, ViT": Task("glyphs", lambda d: models.VisionTransformer(_channels(d), d.classes, 48, _side(d)), 500),
    "text, transformer": Task("text", lambda d: models.TextTransformer(d.classes, d.train[0].shape[1], 32), 500, False),
    "CIFAR, ResNet-20": Task("CIFAR", lambda d: models.ResNet(_channels(d), d.classes, 16), 8000),
    "CIFAR, ConvNeXt": Task("CIFAR", lambda d: models.ConvNeXt(_channels(d), d.classes, 48), 8000),
    "CIFAR, ViT": Task("CIFAR", lambda d: models.VisionTransformer(_channels(d), d.classes, 96, _side(d)), 8000),
}
# Beyond those of the comparison: its two cheapest tasks, four times as long.
EVERY_TASK: Final = TASKS | {
    f"{name}, long": replace(TASKS[name], steps=4 * TASKS[name].steps)
    for name in ("digits, ResNet-20", "glyphs, ResNet-20")
}


@dataclass(frozen=True)
class Run:
    """One training: everything that tells it from the others."""

    stage: Stage
    task: str
    optimizer: str
    rate: float
    decay: float
    seed: int

    @property
    def key(self) -> str:
        return " | ".join([self.stage, self.task, self.optimizer, f"{self.rate:g}", f"{self.decay:g}", str(self.seed)])


@dataclass(frozen=True)
class Protocol:
    """A comparison.

    Attributes:
        tasks: names from `TASKS`.
        optimizers: names from `CANDIDATES`.
        rates: the grid of learning rates, as factors of an optimizer's middle one.
        decays: the grid of weight decays, likewise; holds 1, at which the rate is searched.
        seeds: of the runs that are tested.
        batch: its size.
        steps: by task.
        share: of the data to use.
        finer: a second grid of learning rates, as factors of the best of the first; none by default.
        tuning: the seeds of the search; the best is so by its mean over them.
        curves: whether curves are recorded of the runs that are tested.
    """

    finer: ClassVar[tuple[float, ...]] = ()
    tuning: ClassVar[tuple[int, ...]] = (TUNING_SEED,)
    curves: ClassVar[bool] = True

    tasks: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.data != "CIFAR")
    optimizers: tuple[str, ...] = tuple(CANDIDATES)
    rates: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-3, 4))
    decays: tuple[float, ...] = (0.1, 1.0, 10.0)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    batch: int = 64
    steps: dict[str, int] = field(default_factory=lambda: {name: task.steps for name, task in EVERY_TASK.items()})
    share: float = 1.0

    def total(self) -> int:
        """The number of runs."""
        searched = len(self.rates) + len(self.finer) + len(self.decays) - 1
        return len(self.tasks) * len(self.optimizers) * (searched * len(self.tuning) + len(self.seeds))

    def as_data(self) -> dict[str, Any]:
        """Plain data that tells this comparison from others, with the middles of the grids."""
        middles = {name: [OPTIMIZERS[name].rate, OPTIMIZERS[name].decay] for name in self.optimizers}
        steps = {name: self.steps[name] for name in self.tasks}
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**fields, "steps": steps, "middles": middles}

    def pending(self, records: Records) -> list[Run]:
        """The runs that can be done next, given those that have been: all of a stage before those of the next."""
        found: dict[Stage, list[Run]] = {"rate": [], "decay": [], "test": []}
        for task in self.tasks:
            for optimizer in self.optimizers:
                for run in self.chosen(task, optimizer, records):
                    if run.key not in records:
                        found[run.stage].append(run)
        # Seed by seed, so that a comparison that is not finished has as many of them for each task and optimizer.
        return [*found["rate"], *found["decay"], *sorted(found["test"], key=lambda run: run.seed)]

    def chosen(self, task: str, optimizer: str, records: Records) -> list[Run]:
        """The runs of one optimizer on one task, done or not, as far as it is known which they are."""
        middle = OPTIMIZERS[optimizer]

        def searched(stage: Stage, settings: list[tuple[float, float]]) -> list[Run]:
            return [
                Run(stage, task, optimizer, _round(r), _round(d), seed) for r, d in settings for seed in self.tuning
            ]

        runs = searched("rate", [(middle.rate * factor, middle.decay) for factor in self.rates])
        if (best := _best(runs, records)) is None:
            return runs
        runs += searched("rate", [(best.rate * factor, middle.decay) for factor in self.finer])
        if (best := _best(runs, records)) is None:
            return runs
        # One of the decays is known from before, at the best rate.
        known = [run for run in runs if run.rate == best.rate]
        decays = searched("decay", [(best.rate, middle.decay * factor) for factor in self.decays if factor != 1])
        if (best := _best([*decays, *known], records)) is None:
            return runs + decays
        return runs + decays + [Run("test", task, optimizer, best.rate, best.decay, seed) for seed in self.seeds]


SMOKE: Final = Protocol(
    rates=(1.0,), decays=(0.1, 1.0), seeds=(1,), batch=8, steps=dict.fromkeys(EVERY_TASK, 2), share=0.02
)  # whether it runs, in the least time


def _round(x: float) -> float:
    """To three digits, so that grids read well."""
    return float(f"{x:.3g}")


def _best(runs: list[Run], records: Records) -> Run | None:
    """The first run at the rate and decay of the highest mean validation accuracy; None as long as one is not done."""
    if any(run.key not in records for run in runs):
        return None
    settings: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        settings.setdefault((run.rate, run.decay), []).append(run)

    def merit(same: list[Run]) -> tuple[float, float]:
        found = [records[run.key]["validation"] for run in same]
        losses = [math.inf if f["loss"] is None else f["loss"] for f in found]
        return statistics.mean(f["accuracy"] for f in found), -statistics.mean(losses)

    return max(settings.values(), key=merit)[0]
