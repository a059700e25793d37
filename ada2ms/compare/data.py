"""What the networks are trained on: data of a package, data made here, or a folder of the user's."""

import pickle
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms.demo import digits

Array = NDArray[Any]
Split = tuple[Array, Array]


@dataclass(frozen=True)
class Data:
    """Inputs and targets to train on, to choose hyperparameters by, and to test on once.

    Images are float32 (n, channels, side, side) with labels (n,); texts are int64 (n, length), with the characters that
    follow, (n, length), for targets.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    flips: bool = False  # whether a mirrored image is as good


def load_digits(share: float = 1.0) -> Data:
    """scikit-learn's handwritten digits, 8x8: 1149 to train on, 288 for validation, 360 to test on."""
    data = digits.load()
    images, labels = data.train_images, data.train_labels
    cut = len(labels) * 4 // 5
    splits = ((images[:cut], labels[:cut]), (images[cut:], labels[cut:]), (data.test_images, data.test_labels))
    return _images([(x.transpose(0, 3, 1, 2), y) for x, y in splits], 10, share)


# As on licence plates: no O and no I, which look like 0 and 1.
GLYPHS: Final = "".join(c for c in string.digits + string.ascii_uppercase if c not in "OI")
_FONTS: Final = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")


def load_glyphs(share: float = 1.0) -> Data:
    """Letters and digits in six typefaces, 12x12, distorted: 3400 to train on, 1020 for validation, 3400 to test on."""
    sizes = (100, 30, 100)  # of each of the 34 characters
    splits = [draw_glyphs(max(1, round(n * share)), seed) for seed, n in enumerate(sizes)]
    return _images(splits, len(GLYPHS))


def draw_glyphs(each: int, seed: int, side: int = 12) -> Split:
    """`each` images of every glyph: turned, sheared, scaled, shifted, bent, struck through, and in noise."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    rng = np.random.default_rng(seed)
    rendered = _render()
    labels = np.repeat(np.arange(len(GLYPHS)), each)
    rng.shuffle(labels)
    images = np.empty((len(labels), 1, side, side), np.float32)
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, side)], indexing="ij")).reshape(2, -1)
    for image, label in zip(images, labels, strict=True):
        source = rendered[rng.integers(len(_FONTS)), label]
        turn = rng.normal(0, 0.12)
        linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        wide, high = rng.uniform(0.6, 0.9, 2)
        linear = linear @ np.array([[wide, rng.normal(0, 0.1)], [0, high]])
        bend = gaussian_filter(rng.normal(0, 1, (2, side, side)), (0, 2, 2)).reshape(2, -1)
        positions = linear @ grid + rng.normal(0, 0.06, (2, 1)) + 0.4 * bend
        drawn = map_coordinates(source, (positions + 1) * (source.shape[0] - 1) / 2, order=1).reshape(side, side)
        direction = rng.uniform(0, np.pi)
        across = np.cos(direction) * grid[0] + np.sin(direction) * grid[1] - rng.uniform(-0.7, 0.7)
        stroke = np.exp(-((across / 0.08) ** 2)).reshape(side, side) * rng.uniform(0, 0.5)
        image[0] = np.maximum(drawn * rng.uniform(0.5, 1), stroke) + rng.normal(0, 0.08, (side, side))
    return images, labels


def _render(side: int = 32) -> Array:
    """Every glyph in every typeface, (typefaces, glyphs, side, side), in [0, 1]; matplotlib ships the typefaces."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = []
    for font in _FONTS:
        face = ImageFont.truetype(folder / f"{font}.ttf", size=24)
        for glyph in GLYPHS:
            image = Image.new("L", (side, side))
            ImageDraw.Draw(image).text((side / 2, side / 2), glyph, fill=255, font=face, anchor="mm")
            images.append(np.asarray(image, np.float32) / 255)
    return np.stack(images).reshape(len(_FONTS), len(GLYPHS), side, side)


def load_text(share: float = 1.0, length: int = 32) -> Data:
    """The text of Python's own help, in pieces of 32 characters; the last fifth for validation and test, half each."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    text = text[: int(len(text) * share)]
    kinds = sorted(set(text))
    tokens = np.searchsorted(kinds, list(text)).astype(np.int64)
    pieces = tokens[: (len(tokens) - 1) // length * length].reshape(-1, length)
    following = tokens[1 : pieces.size + 1].reshape(-1, length)
    ends = [0, len(pieces) * 8 // 10, len(pieces) * 9 // 10, len(pieces)]
    train, validation, test = [(pieces[start:end], following[start:end]) for start, end in pairwise(ends)]
    return Data(train, validation, test, len(kinds))


def load_cifar(folder: Path, share: float = 1.0) -> Data:
    """CIFAR-10 or CIFAR-100 in the layout of its Python version; a tenth of what is to train on is for validation.

    Args:
        folder: holds `cifar-10-batches-py` or `cifar-100-python`, or is one of them.
        share: of each split to use.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: a file that is not CIFAR's.
    """
    layouts = {
        "cifar-10-batches-py": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 10),
        "cifar-100-python": (["train"], "test", b"fine_labels", 100),
    }
    for name, (train, test, key, classes) in layouts.items():
        root = folder if folder.name == name else folder / name
        if root.is_dir():
            parts = [_read_cifar(root / file, key, classes) for file in train]
            images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            cut = len(labels) * 9 // 10
            splits = [
                (images[:cut], labels[:cut]),
                (images[cut:], labels[cut:]),
                _read_cifar(root / test, key, classes),
            ]
            return _images(splits, classes, share, flips=True)
    raise FileNotFoundError(f"No CIFAR in {str(folder)!r} (it must hold {' or '.join(layouts)})")


class _OnlyArrays(pickle.Unpickler):
    """Rejects everything that CIFAR's files do not need, since a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if arrays or (module, name) == ("_codecs", "encode"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _read_cifar(file: Path, key: bytes, classes: int) -> Split:
    try:
        with file.open("rb") as stream:
            batch = _OnlyArrays(stream, encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[key], np.int64)
        if labels.shape != images.shape[:1] or not np.all((labels >= 0) & (labels < classes)):
            raise ValueError(f"{len(images)} images, labels of shape {labels.shape}")
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Cannot read {str(file)!r} as a file of CIFAR ({error})") from None
    return images.astype(np.float32) / 255, labels


def _images(splits: list[Split], classes: int, share: float = 1.0, flips: bool = False) -> Data:
    """The first `share` of each split, by channel scaled to mean 0 and deviation 1 of the training images."""
    sizes = [max(1, round(len(y) * share)) for _, y in splits]
    splits = [(x[:n], y[:n]) for n, (x, y) in zip(sizes, splits, strict=True)]
    mean, deviation = (f(splits[0][0], axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    scaled = [(((x - mean) / deviation).astype(np.float32), y.astype(np.int64)) for x, y in splits]
    return Data(scaled[0], scaled[1], scaled[2], classes, flips)


LOADERS: Final[dict[str, Callable[[float], Data]]] = {
    "digits": load_digits,
    "glyphs": load_glyphs,
    "text": load_text,
}
