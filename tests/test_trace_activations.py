"""What traces keep of arrays of a forward pass, and how far apart two are, whatever the order of axes and samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ada2ms.core.trace import outputs
from ada2ms.core.trace.outputs import Output, activation, apart, joined, tensors

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 5, 4, 3)).astype(np.float32) + 0.3  # channels last
WAYS: dict[str, tuple[Callable[[Any], Any], dict[str, bool]]] = {  # the same numbers in another order
    "as it is": (lambda x: x, {}),
    "channels first": (lambda x: x.transpose(0, 3, 1, 2), {}),
    "time before samples": (lambda x: x.swapaxes(0, 1), {}),
    "axes of size 1": (lambda x: x[:, None, ..., None], {}),
    "flattened by channels first": (lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1), {}),
    "samples in another order": (lambda x: x[::-1], {"same_order": False}),
    "all axes together": (lambda x: x.reshape(-1), {}),
}


def between(x: Any, y: Any, **how: bool) -> float:
    found = apart(activation(x), activation(y), **{"same_layout": False, "same_order": True, **how})
    assert found is not None
    return found


@pytest.mark.parametrize("name", WAYS)
def test_the_same_numbers_in_another_order_are_not_apart(name: str) -> None:
    way, how = WAYS[name]
    assert between(IMAGES, way(IMAGES), **how) < 1e-14


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_what_differs_is_apart_in_any_order_and_not_by_more(name: str, size: float) -> None:
    """By the sketches within a factor of about 2, else a lower bound; here of a factor, which all sums see."""
    way, how = WAYS[name]
    other = IMAGES.astype(np.float64) * (1 + size)
    assert 0.2 * size < between(IMAGES, way(other), **how) < 2 * size
    noisy = IMAGES + size * RNG.normal(size=IMAGES.shape)
    true = float(np.linalg.norm(noisy - IMAGES) / max(np.linalg.norm(noisy), np.linalg.norm(IMAGES)))
    assert 1e-4 * size < between(IMAGES, way(noisy), **how) < 3 * true


def test_by_sums_the_estimates_are_lower_bounds() -> None:
    """Of totals and squares exactly; of signed sums on average, within a factor of 2."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(8, 30)) + rng.normal()
        y = x + 0.1 * rng.normal(size=x.shape) * rng.integers(0, 2, 30)
        true = np.linalg.norm(x - y) / max(np.linalg.norm(x), np.linalg.norm(y))
        assert between(x, y[::-1], same_order=False) < 2 * true
        assert between(x, y.reshape(-1)) < true


def test_a_layout_that_is_known_is_the_only_one_that_counts() -> None:
    """In one framework the same shape is the same layout: then a transposed square is another array."""
    square = RNG.normal(size=(4, 7, 7))
    turned = square.transpose(0, 2, 1)
    assert between(square, turned) < 1e-14
    assert between(square, turned, same_layout=True) > 0.5
    assert between(square, square[:, ::-1]) > 0.5, "places within samples"
    assert between(square[:, :, :6], square[:, ::-1, :6]) > 0.5
    assert between(square, square[::-1]) > 0.5, "samples"


def test_arrays_of_other_sizes_and_such_as_are_not_finite() -> None:
    other = {"same_layout": False, "same_order": True}
    assert apart(activation(IMAGES), activation(IMAGES[:, :4]), **other) is None
    broken = IMAGES.copy()
    broken[0, 0] = np.nan
    assert between(IMAGES, broken) == math.inf
    assert between(broken, broken * 2) == 0
    assert between(np.zeros((3, 4)), np.zeros((3, 4))) == 0
    assert between(np.zeros((0, 4)), np.zeros((0, 4))) == 0
    assert between(np.zeros((3, 4)), np.ones((3, 4))) > 0.2
    assert between(np.float32(2.0), np.float32([2.0])) == 0


@pytest.mark.parametrize("shape", [(700, 3), (3, 700), (5, 40, 7), (4097,)], ids=str)
def test_large_arrays_are_summed_piece_by_piece(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(size=shape).astype(np.float32)
    whole = activation(x)
    monkeypatch.setattr(outputs, "_CHUNK", 64)
    pieces = activation(x)
    for what in ("total", "samples", "pooled", "sketches"):
        expected = np.array(getattr(whole, what))
        assert np.allclose(getattr(pieces, what), expected, rtol=1e-12, atol=1e-11 * np.square(x).sum())
    assert whole.total == pytest.approx([x.sum(dtype=np.float64), np.square(x, dtype=np.float64).sum()], rel=1e-12)


def test_types() -> None:
    """16 bits by their name; complex numbers as pairs; whole numbers; and what holds no numbers is refused."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    narrow = IMAGES.astype(ml_dtypes.bfloat16)
    assert activation(narrow).dtype == "bfloat16"
    assert between(narrow, narrow.astype(np.float32)) == 0
    assert activation(narrow.astype(np.float32), "bfloat16").dtype == "bfloat16"
    z = IMAGES + 1j * IMAGES[::-1]
    assert activation(z).norm == pytest.approx(float(np.linalg.norm(z)), rel=1e-6)
    assert not activation(np.arange(4)).is_floating
    with pytest.raises(TypeError, match="must be arrays of numbers"):
        activation(np.array(["a"]))


def test_what_processes_have_adds_up() -> None:
    half = [[Output("a", [activation(part)]), Output(f"only {k}", [])] for k, part in enumerate(np.split(IMAGES, 2))]
    (found,) = joined(half)
    assert (found.name, found.arrays[0].shape) == ("a", list(IMAGES.shape))
    how: dict[str, bool] = {"same_layout": True, "same_order": True}
    assert (apart(found.arrays[0], activation(IMAGES), **how) or 0) < 1e-14
    assert (apart(found.arrays[0], activation(IMAGES * 1.001), **how) or 0) > 4e-4
    same = [Output("a", [activation(IMAGES)])]
    assert joined([same, same]) == same, "each has the whole"


@dataclass
class Result:
    """As libraries of models give."""

    last: Any
    hidden: Any = None


def test_arrays_are_found_in_whatever_holds_them() -> None:
    """In one order, and no other things."""
    held = {"b": [1, (2, None)], "a": Result(3, {"x": Result(4)}), 7: "no", "c": Result}
    assert list(tensors(held, lambda x: isinstance(x, int))) == [3, 4, 1, 2]
