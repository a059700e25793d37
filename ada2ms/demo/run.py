"""Trains the same network in several frameworks and measures how far the trajectories part."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations, islice
from multiprocessing import get_context
from typing import Final

import numpy as np

from ada2ms import core
from ada2ms.core.hyperparameters import Scheduled
from ada2ms.demo.digits import CONVNET, Array, Trainer, initial_weights, load

FRAMEWORKS: Final = ("torch", "tf", "jax")
KERAS_BACKENDS: Final = ("tensorflow", "jax", "torch")
LEARNING_RATE: Final = 2.0**-7  # exact in float32, in which Keras keeps it

EPSILON: Final = float(np.finfo(np.float32).eps)


def rule_bound(step: int) -> float:
    """What the deviation from the NumPy rule, fed the same gradients, may be after `step` float32 steps.

    Every step rounds the parameters once and the averages a few times, and an average remembers: its relative error
    grows by about one epsilon a step, because b2 itself is rounded. Neither gains on `step * EPSILON`; the factor 4
    counts the roundings of one step. A power of v may be taken as exp(h*log(v)), which is off by h*log(v) epsilons: a
    dozen for the smallest entries, from the first step on, where the update is all that biases consist of.
    """
    return (16 + 4 * step) * EPSILON


def mutual_bound(step: int) -> float:
    """What the deviation between two frameworks, each on its own gradients, may be after `step` float32 steps.

    Here the frameworks' convolutions and sums round in their own order, and the next gradient is taken where the last
    update led. Entries of a gradient that nearly cancel keep few digits and yet, at adaptivity 1, move their parameters
    as far as any other: in the first steps that can cost some hundred epsilons, and later it is soon outgrown.
    """
    return (500 + 4 * step) * EPSILON


def deviation(left: list[Array], right: list[Array]) -> float:
    """The largest difference of an entry, relative to the largest entry of its tensor; over all tensors.

    Infinite where there is a NaN, so that the largest of several deviations shows it.
    """
    found = [
        np.max(np.abs(a - b)) / np.max(np.abs(b)) if np.any(a != b) else 0.0 for a, b in zip(left, right, strict=True)
    ]
    largest = float(np.max(found))
    return math.inf if math.isnan(largest) else largest


@dataclass
class Run:
    """One framework's training; lists have an entry for each step.

    Attributes:
        framework: the extra's name, "torch", "tf" or "jax"; with "->" between them where the training is handed over.
        title: framework and version, for people.
        losses: training loss of each batch, before the update.
        parameters: the parameters after each update.
        from_rule: deviation from the NumPy rule in float64, fed the same gradients.
        accuracy: fraction of the test images labelled rightly at the end.
        seconds: wall-clock time of the training steps, compilation included.
        starts: the first step of each segment: 1, and those before which the training was handed over.
    """

    framework: str
    title: str
    losses: list[float]
    parameters: list[list[Array]]
    from_rule: list[float]
    accuracy: float
    seconds: float
    starts: list[int]


def train(
    segments: Sequence[str],
    steps: int,
    seed: int,
    adaptivity: Scheduled,
    progress: Callable[[Iterable[tuple[Array, Array]]], Iterable[tuple[Array, Array]]] = iter,
) -> Run:
    """Trains the convnet on the digits for `steps` steps, on the CPU, in float32.

    Args:
        segments: of `FRAMEWORKS`, installed: the one to train in; or several, each of which takes over parameters and
            optimizer state from the one before and trains for its share of the steps.
        steps: number of batches, at least 1.
        seed: of the initial weights and of the batches.
        adaptivity: a number in [0, 1] or a schedule of ada2ms.core.
        progress: wraps the batches, to show how far the training is.
    """
    data = load()
    weights = initial_weights(CONVNET, seed)
    reference = [w.astype(np.float64) for w in weights]
    rule = core.Ada2MS(reference, lr=LEARNING_RATE, adaptivity=adaptivity)
    batches = iter(progress(data.batches(steps, seed)))
    run, state, titles = Run("->".join(segments), "", [], [], [], 0.0, 0.0, []), None, []
    for segment, framework in enumerate(segments):
        title, device = ready(framework)
        titles.append(title)
        with device:
            trainer = _trainer(framework, weights, adaptivity)
            if state is not None:
                trainer.import_state(state)
            run.starts.append(len(run.losses) + 1)
            last = segment + 1 == len(segments)  # takes all remaining batches, so that the progress bar is complete
            share = None if last else steps * (segment + 1) // len(segments) - len(run.losses)
            for images, labels in islice(batches, share):
                start = time.perf_counter()
                loss, gradients = trainer.step(images, labels)
                run.seconds += time.perf_counter() - start
                rule.step([g.astype(np.float64) for g in gradients])
                run.losses.append(loss)
                run.parameters.append(trainer.parameters())
                run.from_rule.append(deviation(run.parameters[-1], reference))
            state = trainer.export_state()
            run.accuracy = float(np.mean(trainer.predict(data.test_images) == data.test_labels))
        weights = initial_weights(CONVNET, seed + segment + 1)  # the next framework starts from the state alone
    run.title = titles[0] if len(segments) == 1 else "handed over"
    return run


def train_on(backend: str, steps: int, seed: int, adaptivity: Scheduled) -> Run:
    """`train(["tf"], ...)` on this backend of Keras, in a process of its own, since a process has but one backend.

    Args:
        backend: of `KERAS_BACKENDS`, installed.
        steps: number of batches, at least 1.
        seed: of the initial weights and of the batches.
        adaptivity: a number in [0, 1] or a schedule of ada2ms.core.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _choose_backend, (backend,)) as process:
        return process.submit(train, ["tf"], steps, seed, adaptivity).result()


def _choose_backend(backend: str) -> None:
    os.environ["KERAS_BACKEND"] = backend  # Keras is imported later, by `ready`
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends this process without a word; its parent reports it


def from_each_other(runs: list[Run]) -> list[float]:
    """For each step, the largest deviation between two of the runs; zeros for a single run."""
    pairs = [from_other(a, b) for a, b in combinations(runs, 2)]
    return [max(at_step) for at_step in zip(*pairs, strict=True)] or [0.0] * len(runs[0].losses)


def from_other(run: Run, other: Run) -> list[float]:
    """For each step, the deviation between two runs."""
    return [deviation(a, b) for a, b in zip(run.parameters, other.parameters, strict=True)]


def parted(runs: list[Run]) -> list[str]:
    """The bounds that were not kept, each in a sentence; none for trajectories that lie on each other."""
    found = [_first_over(run.from_rule, rule_bound, f"{run.title} parts from the NumPy rule") for run in runs]
    found.append(_first_over(from_each_other(runs), mutual_bound, "the frameworks part from each other"))
    return [sentence for sentence in found if sentence]


def _first_over(deviations: list[float], bound: Callable[[int], float], what: str) -> str | None:
    for step, value in enumerate(deviations, start=1):
        if not value <= bound(step):  # a NaN is not within any bound
            return f"{what}: step {step}, deviation {value:.1e}, bound {bound(step):.1e}"
    return None


def missing(framework: str, backends: Sequence[str] = ()) -> str | None:
    """What is not installed for this framework and how to install it; None if all is there.

    Args:
        framework: of `FRAMEWORKS`.
        backends: those of Keras that are wanted; none for whichever there is.
    """
    modules = {"torch": ["torch"], "tf": ["keras"], "jax": ["jax", "optax"]}[framework]
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        return f"{framework}: {' and '.join(absent)} not installed (pip install 'ada2ms[{framework}]')"
    return _missing_backend(backends) if framework == "tf" else None


def _missing_backend(wanted: Sequence[str]) -> str | None:
    absent = [backend for backend in wanted if find_spec(backend) is None]
    if absent:
        return f"tf: {' and '.join(absent)} not installed (pip install {' '.join(absent)})"
    if not any(find_spec(backend) for backend in KERAS_BACKENDS):
        return f"tf: Keras has no backend (install one of {', '.join(KERAS_BACKENDS)})"
    chosen = os.environ.get("KERAS_BACKEND")
    if not wanted and chosen in KERAS_BACKENDS and find_spec(chosen) is None:
        return f"tf: {chosen}, which KERAS_BACKEND names, not installed"
    return None


_Ready = tuple[str, AbstractContextManager[object]]


def ready(framework: str) -> _Ready:
    """Imports a framework, installed; returns its name and version, for people, and what keeps it on the CPU."""
    return {"torch": _torch, "tf": _tf, "jax": _jax}[framework]()


def _torch() -> _Ready:
    import torch

    torch.set_num_threads(1)  # more threads slow a network this small down on a busy machine
    return f"PyTorch {torch.__version__}", torch.device("cpu")


def _tf() -> _Ready:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow logs at length on import,
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # and warns that these change the order of its sums
    if "KERAS_BACKEND" not in os.environ and find_spec("tensorflow") is None:
        os.environ["KERAS_BACKEND"] = next(backend for backend in KERAS_BACKENDS if find_spec(backend))
    if find_spec("triton"):
        import triton  # noqa: F401  # for torch; after TensorFlow 2.20 or 2.21 it crashes (tensorflow/tensorflow#124205)
    import keras

    backend = keras.backend.backend()
    device = "cpu:0" if backend == "jax" else "cpu"  # as Keras 3.5 wants it; torch would copy variables to its cpu:0
    return f"Keras {keras.__version__} on {backend}", keras.device(device)


def _jax() -> _Ready:
    import jax

    return f"JAX {jax.__version__}", jax.default_device(jax.devices("cpu")[0])


def _trainer(framework: str, weights: list[Array], adaptivity: Scheduled) -> Trainer:
    if framework == "torch":
        from ada2ms import torch
        from ada2ms.demo.on_torch import TorchTrainer

        return TorchTrainer(weights, lambda params: torch.Ada2MS(params, lr=LEARNING_RATE, adaptivity=adaptivity))
    if framework == "tf":
        from ada2ms import tf
        from ada2ms.demo.on_keras import KerasTrainer

        return KerasTrainer(weights, tf.Ada2MS(learning_rate=LEARNING_RATE, adaptivity=adaptivity))
    from ada2ms import jax
    from ada2ms.demo.on_jax import JaxTrainer

    return JaxTrainer(weights, jax.ada2ms(LEARNING_RATE, adaptivity=adaptivity))
