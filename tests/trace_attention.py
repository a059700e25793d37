"""One block of attention in each framework, with room for planted faults of its forward pass, whose outputs are traced.

Letters of a small alphabet, embedded; one head of attention over those before, with a residual; a LayerNorm; and the
letter that follows. Letters of number 0 are padding, to which nothing attends.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

STEPS, BATCH, TIME, LETTERS, WIDTH = 6, 6, 7, 9, 8
LR, DECAY = 1e-2, 1e-2
LAYERS = (("embedding", LETTERS, WIDTH), *[("dense", WIDTH, WIDTH)] * 4, ("norm", WIDTH, 0), ("dense", WIDTH, LETTERS))


def weights() -> dict[str, np.ndarray]:
    """By neutral names."""
    rng, found = np.random.default_rng(0), {}
    for i, (kind, inputs, outputs) in enumerate(LAYERS):
        if kind == "norm":
            found |= {
                f"{i}.norm.scale": 1 + 0.1 * rng.normal(size=inputs),
                f"{i}.norm.bias": 0.1 * rng.normal(size=inputs),
            }
            continue
        role = "table" if kind == "embedding" else "kernel"
        found[f"{i}.{kind}.{role}"] = rng.normal(size=(inputs, outputs)) / (math.sqrt(inputs) if i else 1)
        if kind == "dense":
            found[f"{i}.dense.bias"] = 0.1 * rng.normal(size=outputs)
    return {name: x.astype(np.float32) for name, x in found.items()}


def batches(within: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """Letters, and those that follow; `within`: the samples in another order."""
    rng, found = np.random.default_rng(1), []
    for _ in range(STEPS):
        letters = (rng.integers(1, LETTERS, (BATCH, 1)) + np.arange(TIME + 1)) % LETTERS
        letters = letters[::-1].copy() if within else letters
        found.append((letters[:, :-1].astype(np.int32), letters[:, 1:].astype(np.int32)))
    return found


def hidden(letters: np.ndarray, *, causal: bool = True, padding: bool = True) -> np.ndarray:
    """What is not attended to: of each letter those after it, and padding; but always itself."""
    found = np.zeros((*letters.shape, letters.shape[1]), bool)
    if causal:
        found |= np.triu(np.ones(found.shape[1:], bool), 1)
    if padding:
        found |= (letters == 0)[:, None, :]
    return found & ~np.eye(letters.shape[1], dtype=bool)


def train_torch(
    path: Path,
    *,
    data: Any = None,
    axis: int = -1,
    scale: float = WIDTH**-0.5,
    residual: bool = True,
    optimizer: Any = None,
    **mask: bool,
) -> Path:
    import torch
    from torch import nn

    from ada2ms.torch import Recorder, plain_layers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(LETTERS, WIDTH)
            self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS)

        def forward(self, x: Any) -> Any:
            h = self.embed(x)
            logits = scale * self.q(h) @ self.k(h).mT
            logits = logits.masked_fill(torch.from_numpy(hidden(x.numpy(), **mask)), -1e9)
            attended = self.out(logits.softmax(axis) @ self.v(h))
            return self.head(self.norm(h + attended if residual else attended))

    net, start = Model(), weights()
    mappings = plain_layers(net)
    with torch.no_grad():
        for own, p in net.named_parameters():
            name = str(mappings["names"][own])
            p.copy_(torch.from_numpy(start[name].T if name.endswith("kernel") else start[name]))
    opt = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY) if optimizer is None else optimizer(net)
    with Recorder(path, net, opt, outputs=True, **mappings) as recorder:
        for x, y in batches(**(data or {})):
            recorder.batch(x, y)
            logits = net(torch.from_numpy(x))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).long().flatten())
            recorder.loss(loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
    return path


def train_jax(
    path: Path,
    *,
    data: Any = None,
    axis: int = -1,
    scale: float = WIDTH**-0.5,
    residual: bool = True,
    **mask: bool,
) -> Path:
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import Recorder, recorded

    params = {name: jnp.asarray(x) for name, x in weights().items()}
    optimizer = optax.adamw(LR, weight_decay=DECAY)
    hyper = {"lr": LR, "weight_decay": DECAY, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    with Recorder(path, params, hyper=hyper, optimizer="optax.adamw") as recorder:

        def told(name: str, x: Any) -> Any:
            recorder.output(name, x)
            return x

        def loss_of(p: Any, x: Any, y: Any, no: Any) -> Any:
            def dense(i: int, h: Any) -> Any:
                return told(f"{i}.dense", h @ p[f"{i}.dense.kernel"] + p[f"{i}.dense.bias"])

            h = told("0.embedding", p["0.embedding.table"][x])
            logits = jnp.where(no, -1e9, scale * dense(1, h) @ dense(2, h).swapaxes(1, 2))
            attended = dense(4, jax.nn.softmax(logits, axis) @ dense(3, h))
            h = h + attended if residual else attended
            h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
            h = told("5.norm", h * p["5.norm.scale"] + p["5.norm.bias"])
            return optax.softmax_cross_entropy_with_integer_labels(dense(6, h), y).mean()

        opt = recorded(optimizer, recorder)
        state = opt.init(params)

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any, no: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, x, y, no)
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        for x, y in batches(**(data or {})):
            recorder.batch(x, y)
            params, state, loss = step(params, state, x, y, hidden(x, **mask))
            recorder.loss(loss)
    return path


def train_keras(
    path: Path,
    *,
    optimizer: Any,
    data: Any = None,
    axis: int = -1,
    scale: float = WIDTH**-0.5,
    residual: bool = True,
    **mask: bool,
) -> Path:
    import keras
    from keras import layers, ops

    from ada2ms.tf import Recorder, plain_layers

    class Model(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embed = layers.Embedding(LETTERS, WIDTH)
            self.q, self.k, self.v, self.out = (layers.Dense(WIDTH) for _ in range(4))
            self.norm, self.head = layers.LayerNormalization(epsilon=1e-5), layers.Dense(LETTERS)

        def call(self, given: Any) -> Any:
            h, no = self.embed(given[0]), given[1]
            logits = ops.where(no, -1e9, scale * ops.matmul(self.q(h), ops.swapaxes(self.k(h), 1, 2)))
            attended = self.out(ops.matmul(ops.softmax(logits, axis), self.v(h)))
            return self.head(self.norm(h + attended if residual else attended))

    x, y = (np.concatenate(each) for each in zip(*batches(**(data or {})), strict=True))
    given = [x, hidden(x, **mask)]
    model, start = Model(), weights()
    model([each[:1] for each in given])
    mappings = plain_layers(model)
    for variable in model.trainable_variables:
        variable.assign(start[str(mappings["names"][variable.path])])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    with Recorder(path, model, outputs=True, **mappings) as recorder:
        recorder.batch = lambda *arrays: type(recorder).batch(recorder, arrays[0], arrays[-1])  # without the mask
        model.fit(given, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[recorder])
    return path
