"""The same numbers whichever backend Keras runs on, each in a process of its own.

By hand, one backend alone: `KERAS_BACKEND=jax JAX_ENABLE_X64=1 python tests/test_keras_backends.py weights.npz`.
"""

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms import core
from ada2ms.demo.run import deviation

pytestmark = pytest.mark.slow

BACKENDS = ("tensorflow", "jax", "torch")
STEPS, BATCH, TOKENS, LENGTH = 60, 8, 7, 5
LEARNING_RATE = 2.0**-6
CASES: dict[str, dict[str, Any]] = {
    "half-way": {},
    "transition": {"adaptivity": core.Cosine(1.0, 0.0, steps=STEPS // 2)},
    "tensor": {"adaptivity": 0.25, "scope": "tensor"},
    "decay, skip": {"adaptivity": 0.0, "weight_decay": 0.5, "nonfinite": "skip"},
}
RNG = np.random.default_rng(0)
X = RNG.integers(0, TOKENS, (STEPS, BATCH, LENGTH)).astype("int32")  # tokens repeat, within a text too
Y = np.sin(X.sum(-1, keepdims=True))
INITIAL = [RNG.normal(size=shape) / 2 for shape in ((TOKENS, 4), (4 * LENGTH, 6), (6,), (6, 1), (1,))]


def by_keras() -> dict[str, Any]:
    """The weights after every step of `train_on_batch`, on the backend that KERAS_BACKEND names."""
    import keras

    from ada2ms.tf import Ada2MS

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    found = {}
    for name, options in CASES.items():
        # Up to Keras 3.15 at least, some operations compute float64 in float32: Dense on torch; tanh and means on JAX.
        hidden = keras.layers.EinsumDense("bi,io->bo", 6, bias_axes="o", activation="silu")
        layers = [keras.layers.Embedding(TOKENS, 4), keras.layers.Flatten(), hidden]
        last = keras.layers.EinsumDense("bi,io->bo", 1, bias_axes="o")
        model = keras.Sequential([keras.Input((LENGTH,), dtype="int32"), *layers, last])
        model.set_weights(INITIAL)
        model.compile(Ada2MS(LEARNING_RATE, **options), "mse")
        for i, (x, y) in enumerate(zip(X, Y, strict=True)):
            model.train_on_batch(x, y)
            found.update({f"{name}/{i}/{j}": w for j, w in enumerate(model.get_weights())})
    return found


def by_core(options: dict[str, Any]) -> list[list[Any]]:
    """The same by the NumPy rule, in a closed loop: gradients are worked out by hand, at its own weights."""
    table, w1, b1, w2, b2 = params = [w.copy() for w in INITIAL]
    optimizer = core.Ada2MS(params, lr=LEARNING_RATE, **options)
    trajectory = []
    for x, y in zip(X, Y, strict=True):
        rows = table[x].reshape(BATCH, -1)
        z = rows @ w1 + b1
        sigmoid = 1 / (1 + np.exp(-z))
        h = z * sigmoid
        error = 2 * (h @ w2 + b2 - y) / y.size
        inner = error @ w2.T * (sigmoid * (1 + z * (1 - sigmoid)))
        g = np.zeros_like(table)
        np.add.at(g, x, (inner @ w1.T).reshape(BATCH, LENGTH, 4))
        optimizer.step([g, rows.T @ inner, inner.sum(0), h.T @ error, error.sum(0)])
        trajectory.append([p.copy() for p in params])
    return trajectory


def run(backend: str, file: Path) -> None:
    """Writes the weights to a file, in a process of this Keras backend."""
    own = {"KERAS_BACKEND": backend, "JAX_ENABLE_X64": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, str(file)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_backends_and_the_rule_take_the_same_path(tmp_path: Path) -> None:
    """In float64, 450 epsilons at every step: the bound, and the reason, of the closed loops in test_trajectories.py.
    Sums in another order cost about an epsilon of the gradient a step."""
    trajectories: dict[str, dict[str, list[list[Any]]]] = {"core": {n: by_core(o) for n, o in CASES.items()}}
    for backend in BACKENDS:
        path = tmp_path / f"{backend}.npz"
        run(backend, path)
        with np.load(path) as weights:
            trajectories[backend] = {
                name: [[weights[f"{name}/{i}/{j}"] for j in range(len(INITIAL))] for i in range(STEPS)]
                for name in CASES
            }
    for left, right in combinations(trajectories, 2):
        for name in CASES:
            pairs = list(zip(trajectories[left][name], trajectories[right][name], strict=True))
            assert len(pairs) == STEPS
            for i, (a, b) in enumerate(pairs):
                assert deviation(a, b) < 1e-13, f"{left} and {right}, {name}, step {i}"
    for name, other in combinations(CASES, 2):  # and it is no empty comparison
        assert deviation(trajectories["core"][name][-1], trajectories["core"][other][-1]) > 1e-3


if __name__ == "__main__":
    np.savez(sys.argv[1], **by_keras())
