"""What the models are trained on: images of digits, and the letters of a text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ada2ms.core import spec
from ada2ms.demo import digits

Array = Any
BATCH, TIME = 8, 12
TEXT = Path(spec.__file__).read_text()
LETTERS = sorted(set(TEXT))
NAMES: dict[str, Any] = {"vit": "auto", "gpt": None, "lstm": None, "resnet": None}  # as plain_layers takes them


def batches(kind: str, dtype: str, steps: range) -> Iterator[tuple[Array, Array]]:
    """The batches of these steps: (8, 8, 8, 1) images and their labels, or (8, 12) letters and those that follow."""
    data = digits.load(dtype)
    text = np.array([LETTERS.index(letter) for letter in TEXT], np.int32)
    for step in steps:
        rng = np.random.default_rng(step)
        if kind == "gpt":
            chosen = rng.integers(0, len(text) - TIME, (BATCH, 1)) + np.arange(TIME + 1)
            yield text[chosen[:, :-1]], text[chosen[:, 1:]]
        else:
            chosen = rng.choice(len(data.train_labels), BATCH, replace=False)
            yield data.train_images[chosen], data.train_labels[chosen]
