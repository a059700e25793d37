"""The study that the default adaptivity is chosen by: its protocol and its rule, both laid down before its first run.

The protocol is the comparison's (`protocol.py`), for fewer optimizers and with more care:

- The rate is searched on the grid of half decades, and then a quarter of a decade to both sides of the best.
- Rates and decays are searched by the mean over two seeds, and tested on ten others, the same for every optimizer.
- The two cheapest tasks are there twice: as they are, and four times as long.

The rule, for the test accuracies of the candidates by task and seed:

    mean      of a candidate on a task, over the seeds that are whole: tested for every task and optimizer
    unit      of a task: the least of the standard errors of the differences, seed by seed, of any two candidates;
              at least `FLOOR`
    loss      of a candidate on a task: how far its mean is below the highest of the candidates' means, in units
    worst     of a candidate: its greatest loss on any task

The candidate of the least worst loss is chosen. Those that come within `TIE` of it are its equals; among equals the
first is chosen: today's default, then the one that is closest to it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar, Final

import numpy as np

from ada2ms.compare.protocol import EVERY_TASK, Protocol, Records

CHOICES: Final = ("Ada2MS 0.5", "Ada2MS 0.75", "Ada2MS 0.9")  # what may become the default; the simplest first
YARDSTICK: Final = "AdamW"
FLOOR: Final = 0.002  # of accuracy
TIE: Final = 2.0  # units
ENOUGH: Final = 5  # whole seeds, without which nothing is chosen

Scores = Mapping[str, Mapping[str, Sequence[float]]]  # test accuracy by task, by candidate, for each seed


@dataclass(frozen=True)
class Study(Protocol):
    """The study's protocol; the attributes are those of `Protocol`."""

    tasks: tuple[str, ...] = tuple(name for name, task in EVERY_TASK.items() if task.data != "CIFAR")
    optimizers: tuple[str, ...] = (YARDSTICK, *CHOICES)
    rates: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-1, 4))
    seeds: tuple[int, ...] = tuple(range(11, 21))
    finer: ClassVar[tuple[float, ...]] = (10**-0.25, 10**0.25)
    tuning: ClassVar[tuple[int, ...]] = (0, 1)
    curves: ClassVar[bool] = False

    def as_data(self) -> dict[str, Any]:
        """Plain data that tells this study from others."""
        return {**super().as_data(), "finer": list(self.finer), "tuning": list(self.tuning)}

    def whole(self, records: Records) -> list[int]:
        """The seeds that have been tested for every task and optimizer."""
        runs = [run for task in self.tasks for name in self.optimizers for run in self.chosen(task, name, records)]
        done = [run.seed for run in runs if run.stage == "test" and run.key in records]
        return [seed for seed in self.seeds if done.count(seed) == len(self.tasks) * len(self.optimizers)]

    def scores(self, records: Records) -> dict[str, dict[str, list[float]]]:
        """Test accuracies of all optimizers, by task and optimizer, for each of the whole seeds."""
        seeds = self.whole(records)
        return {
            task: {
                name: [
                    records[run.key]["test"]["accuracy"]
                    for run in self.chosen(task, name, records)
                    if run.stage == "test" and run.seed in seeds
                ]
                for name in self.optimizers
            }
            for task in self.tasks
        }


SMOKE: Final = replace(
    Study(), rates=(1.0,), decays=(1.0,), seeds=(11, 12), batch=8, steps=dict.fromkeys(EVERY_TASK, 2), share=0.02
)


def unit(scores: Mapping[str, Sequence[float]]) -> float:
    """The unit of a task, from the accuracies of each candidate for at least two seeds."""
    pairs = combinations([scores[name] for name in CHOICES], 2)
    apart = [np.asarray(a, float) - np.asarray(b, float) for a, b in pairs]
    return max(FLOOR, min(float(d.std(ddof=1)) / math.sqrt(len(d)) for d in apart))


def losses(scores: Scores) -> dict[str, dict[str, float]]:
    """The loss of every candidate, by task."""
    found = {}
    for task, accuracies in scores.items():
        means = {name: statistics.fmean(accuracies[name]) for name in CHOICES}
        size = unit(accuracies)
        found[task] = {name: (max(means.values()) - means[name]) / size for name in CHOICES}
    return found


def worst(scores: Scores) -> dict[str, float]:
    """The worst loss of every candidate."""
    by_task = losses(scores)
    return {name: max(loss[name] for loss in by_task.values()) for name in CHOICES}


def choice(scores: Scores) -> str:
    """The candidate that the rule chooses."""
    found = worst(scores)
    return next(name for name in CHOICES if found[name] <= min(found.values()) + TIE)


def stability(scores: Scores, draws: int = 2000) -> dict[str, float]:
    """How often each candidate is chosen if as many seeds are drawn anew from those that there are: the bootstrap."""
    rng = np.random.default_rng(0)
    count = len(next(iter(next(iter(scores.values())).values())))
    chosen = []
    for _ in range(draws):
        drawn = rng.integers(count, size=count)
        chosen.append(choice({t: {n: np.asarray(a[n])[drawn].tolist() for n in CHOICES} for t, a in scores.items()}))
    return {name: chosen.count(name) / draws for name in CHOICES}
