"""A Vision Transformer that goes from framework to framework in mid-run, beside the run that stays in the first."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Protocol

import numpy as np

from ada2ms.core import State
from ada2ms.core.hyperparameters import Hyperparameters, Scheduled
from ada2ms.core.state import Entry, Group
from ada2ms.demo.digits import Array, load
from ada2ms.demo.run import LEARNING_RATE, deviation, mutual_bound, ready

STEPS: Final = 5  # in each framework

WIDTH: Final = 16
_PROJECTION: Final = {"kernel": (WIDTH, 4, 4), "bias": (4, 4)}
_NORM: Final = {"norm.scale": (WIDTH,), "norm.bias": (WIDTH,)}
_BLOCK: Final = {
    **{f"norm{i}.{name}": shape for i in (1, 2) for name, shape in _NORM.items()},
    **{f"attention.attention.{x}.{y}": shape for x in ("query", "key", "value") for y, shape in _PROJECTION.items()},
    "attention.attention.out.kernel": (4, 4, WIDTH),
    "attention.attention.out.bias": (WIDTH,),
    "up.dense.kernel": (WIDTH, 4 * WIDTH),
    "up.dense.bias": (4 * WIDTH,),
    "down.dense.kernel": (4 * WIDTH, WIDTH),
    "down.dense.bias": (WIDTH,),
}
# By the names in a state: 2x2 patches, a class token, positions, 2 blocks with 4 heads, and 10 logits.
SHAPES: Final[dict[str, tuple[int, ...]]] = {
    "class_token": (1, 1, WIDTH),
    "positions": (1, 17, WIDTH),
    "patches.conv.kernel": (2, 2, 1, WIDTH),
    "patches.conv.bias": (WIDTH,),
    **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in _BLOCK.items()},
    **{f"norm.{name}": shape for name, shape in _NORM.items()},
    "head.dense.kernel": (WIDTH, 10),
    "head.dense.bias": (10,),
}


class Trainer(Protocol):
    """A model in one framework with its optimizer."""

    def step(self, x: Array, y: Array) -> None:
        """Trains on one batch."""
        ...

    def predict(self, x: Array) -> Array:
        """The logits."""
        ...

    def export_state(self) -> State:
        """Parameters and optimizer state, to go on from in another framework."""
        ...

    def import_state(self, state: State) -> Any:
        """Goes on from a state of any framework."""
        ...


@dataclass
class Segment:
    """What was trained in one framework.

    Attributes:
        framework: the extra's name, "torch", "tf" or "jax".
        title: framework and version, for people.
        first, last: its steps, counted from 1.
        loss: on the test images, at the end.
        seconds: wall-clock time, with making the model and compilation.
        deviations: after each step, the largest of the parameters from those of the run that stayed; relative to the
            largest of their tensor.
    """

    framework: str
    title: str
    first: int
    last: int
    loss: float
    seconds: float
    deviations: list[float]


def beginning(seed: int, adaptivity: Scheduled) -> State:
    """Random parameters, no step done yet."""
    rng = np.random.default_rng(seed)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    entries = {name: Entry(zero, zero, 0, None, _initial(name, zero.shape, rng)) for name, zero in zeros.items()}
    hyper = vars(Hyperparameters(lr=LEARNING_RATE, adaptivity=adaptivity))
    return State(entries, [Group(list(SHAPES), hyper, 0.0, 0)])


def _initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    inputs = shape[:1] if shape == _PROJECTION["kernel"] else shape[:-1]
    scale = 1 / np.sqrt(np.prod(inputs)) if name.endswith("kernel") else 0.02
    initial: Array = (float(name.endswith("scale")) + scale * rng.standard_normal(shape)).astype(np.float32)
    return initial


def installed(frameworks: Sequence[str]) -> list[str]:
    """Those that can train the transformer: in JAX it is a model of flax."""
    return [name for name in frameworks if name != "jax" or find_spec("flax")]


def hand_over(
    frameworks: Sequence[str],
    seed: int,
    adaptivity: Scheduled,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Segment]:
    """Trains the transformer on the digits, `STEPS` steps in each framework and then in the first again, on the CPU.

    Args:
        frameworks: of `installed`, at least one.
        seed: of the initial parameters and of the batches.
        adaptivity: a number in [0, 1] or a schedule of ada2ms.core.
        progress: wraps the segments, to show how far the training is.
    """
    data, state = load(), beginning(seed, adaptivity)
    places = [*frameworks, frameworks[0]]
    batches = list(data.batches(STEPS * len(places), seed))
    with _trainer(frameworks[0], state) as (_, trainer):
        stayed = [_parameters(trainer, x, y) for x, y in batches]
    segments = []
    for first in progress(range(0, len(batches), STEPS)):
        start, framework = time.perf_counter(), places[first // STEPS]
        with _trainer(framework, state) as (title, trainer):
            found = [_parameters(trainer, x, y) for x, y in batches[first : first + STEPS]]
            state, logits = trainer.export_state(), trainer.predict(data.test_images)
        deviations = [deviation(a, b) for a, b in zip(found, stayed[first:], strict=False)]
        loss, seconds = _loss(logits, data.test_labels), time.perf_counter() - start
        segments.append(Segment(framework, title, first + 1, first + STEPS, loss, seconds, deviations))
    return segments


def parted(segments: list[Segment]) -> list[str]:
    """Where the bound between frameworks was not kept, in a sentence; none for a transformer that went on as it would
    have in the first framework.
    """
    for segment in segments:
        for step, value in enumerate(segment.deviations, start=segment.first):
            if not value <= mutual_bound(step):  # a NaN is not within any bound
                what = f"the transformer that was handed over to {segment.title} parts from the one that stayed"
                return [f"{what}: step {step}, deviation {value:.1e}, bound {mutual_bound(step):.1e}"]
    return []


@contextmanager
def _trainer(framework: str, state: State) -> Iterator[tuple[str, Trainer]]:
    """One that goes on from the state, on the CPU; and the framework's title."""
    title, device = ready(framework)
    module = {"torch": "vit_on_torch", "tf": "vit_on_keras", "jax": "vit_on_nnx"}[framework]
    with device:
        trainer = import_module(f"ada2ms.demo.{module}").trainer(state)
        trainer.import_state(state)
        yield title, trainer


def _parameters(trainer: Trainer, x: Array, y: Array) -> list[Array]:
    """After a step; but not the keys' biases, which reach no output: their gradients are zero but for rounding."""
    trainer.step(x, y)
    state = trainer.export_state()
    params = [state.parameters[name].param for name in SHAPES if not name.endswith("key.bias")]
    return [param for param in params if param is not None]


def _loss(logits: Array, labels: Array) -> float:
    """The mean cross-entropy."""
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen))
