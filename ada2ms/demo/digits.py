"""Real data for the demo and the tests: scikit-learn's handwritten digits, which ship with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ada2ms.core import State

Array = NDArray[Any]

# (height, width, in, out) is a 3x3 convolution, then SiLU, then 2x2 average pooling; (in, out) is a dense layer, with
# SiLU unless it is the last. SiLU, because at the kink of ReLU a single rounding could separate two trajectories.
CONVNET = ((3, 3, 1, 8), (3, 3, 8, 16), (64, 10))
MLP = ((64, 32), (32, 10))


class Trainer(Protocol):
    """The network in one framework, with its optimizer. Arrays go in and out in one layout for all: kernels are
    (height, width, in, out) or (in, out), each followed by its bias; images are (batch, 8, 8, 1).
    """

    def step(self, images: Array, labels: Array) -> tuple[float, list[Array]]:
        """Trains on one batch; returns the loss and the gradients, both of before the update."""
        ...

    def parameters(self) -> list[Array]:
        """Copies of the parameters."""
        ...

    def predict(self, images: Array) -> Array:
        """The most likely label of each image."""
        ...

    def export_state(self) -> State:
        """Parameters and optimizer state, to go on from in another framework."""
        ...

    def import_state(self, state: State) -> None:
        """Goes on from a state of any framework."""
        ...


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], (n, 8, 8, 1), and labels 0 to 9; four fifths to train on, one fifth to test on."""

    train_images: Array
    train_labels: Array
    test_images: Array
    test_labels: Array

    def batches(self, steps: int, seed: int, size: int = 64) -> Iterator[tuple[Array, Array]]:
        """`steps` batches, from a new order of the training images each epoch."""
        for chosen in shuffled(len(self.train_labels), size, steps, np.random.default_rng(seed)):
            yield self.train_images[chosen], self.train_labels[chosen]


def shuffled(count: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[Array]:
    """The indices, below `count`, of `steps` batches: in a new order each epoch, which drops what does not fill one."""
    order = np.empty(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(count)
        chosen, order = order[:size], order[size:]
        yield chosen


def load(dtype: str = "float32") -> Digits:
    """The digits, always split in the same way."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order, :, :, None] / 16).astype(dtype)
    labels = data.target[order].astype(np.int32)
    cut = len(labels) * 4 // 5
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def initial_weights(shapes: tuple[tuple[int, ...], ...], seed: int, dtype: str = "float32") -> list[Array]:
    """He-normal kernels and zero biases, the same numbers in every precision."""
    rng = np.random.default_rng(seed)
    weights = []
    for shape in shapes:
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        kernel = (scale * rng.standard_normal(shape)).astype(np.float32)
        weights += [kernel.astype(dtype), np.zeros(shape[-1], dtype)]
    return weights
