"""Transformers that are trained in torch, flax.nnx and Keras from the same weights, and traced."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from models.data import batches

from ada2ms.core import State
from ada2ms.core.trace import Trace

LR, DECAY = 1e-3, 1e-2
FOLDER = tempfile.TemporaryDirectory()


def _state(kind: str, dtype: str, seed: int) -> State:
    """Of a new model in torch, whose weights all start from."""
    import torch
    from models import on_torch

    trainer = on_torch.Trainer(kind, dtype, lr=LR, weight_decay=DECAY)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return trainer.export_state()


def train_torch(kind: str, path: Path, optimizer: str, steps: int, dtype: str, seed: int, threads: int = 1) -> None:
    import torch
    from models import on_torch
    from torch.nn import functional

    from ada2ms.torch import Ada2MS, Recorder

    state = _state(kind, dtype, seed)
    trainer = on_torch.Trainer(kind, dtype, state)
    trainer.import_state(state)
    made: Any = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY),
        "Ada2MS": lambda p: Ada2MS(p, lr=LR, weight_decay=DECAY),
        "Ada2MS at 1": lambda p: Ada2MS(p, lr=LR, weight_decay=DECAY, adaptivity=1.0),
    }[optimizer]
    own = made(trainer.model.parameters())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Recorder(path, trainer.model, own, **trainer.mappings) as recorder:
            for x, y in batches(kind, dtype, range(steps)):
                recorder.batch(x, y)
                own.zero_grad()
                logits = trainer.model(torch.tensor(x))
                loss = functional.cross_entropy(logits.flatten(0, -2), torch.tensor(y).long().flatten())
                recorder.loss(loss)
                loss.backward()
                own.step()
    finally:
        torch.set_num_threads(before)


def train_nnx(kind: str, path: Path, optimizer: str, steps: int, dtype: str, seed: int) -> None:
    import optax
    from flax import nnx
    from models import on_nnx

    from ada2ms.jax import Recorder, ada2ms, recorded

    state = _state(kind, dtype, seed)
    trainer = on_nnx.Trainer(kind, dtype, state)
    trainer.import_state(state)
    made: Any = {
        "AdamW": lambda: optax.adamw(LR, weight_decay=DECAY),
        "Ada2MS": lambda: ada2ms(LR, weight_decay=DECAY),
        "Ada2MS at 1": lambda: ada2ms(LR, weight_decay=DECAY, adaptivity=1.0),
    }[optimizer]
    hyper = {"lr": LR, "weight_decay": DECAY, **({"adaptivity": 1.0} if optimizer == "Ada2MS at 1" else {})}
    called = "optax.adamw" if optimizer == "AdamW" else "ada2ms.jax.ada2ms"
    params = nnx.state(trainer.model, nnx.Param)
    with Recorder(path, params, hyper=hyper, optimizer=called, **trainer.mappings) as recorder:
        own = nnx.Optimizer(trainer.model, recorded(made(), recorder), wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, own: Any, x: Any, y: Any) -> Any:
            def loss_of(model: Any) -> Any:
                losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
                return losses.mean()

            loss, grads = nnx.value_and_grad(loss_of)(model)
            own.update(model, grads)
            return loss

        for x, y in batches(kind, dtype, range(steps)):
            recorder.batch(x, y)
            recorder.loss(step(trainer.model, own, x, y))


def train_keras(kind: str, path: Path, optimizer: str, steps: int, dtype: str, seed: int) -> None:
    import keras
    from models import on_keras

    from ada2ms.tf import Ada2MS, Recorder

    state = _state(kind, dtype, seed)
    trainer = on_keras.Trainer(kind, dtype, state)
    trainer.import_state(state)
    options = {"adaptivity": 1.0} if optimizer == "Ada2MS at 1" else {}
    own = (
        keras.optimizers.AdamW(LR, weight_decay=DECAY, epsilon=1e-8)
        if optimizer == "AdamW"
        else Ada2MS(LR, weight_decay=DECAY, **options)
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer.model.compile(own, loss, run_eagerly=True)
    x, y = (np.concatenate(arrays) for arrays in zip(*batches(kind, dtype, range(steps)), strict=True))
    with Recorder(path, trainer.model, **trainer.mappings) as recorder:
        trainer.model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[recorder])


@cache
def trace(framework: str, kind: str, optimizer: str = "AdamW", **options: Any) -> Trace:
    """The trace of a model, by "torch", "nnx" or "keras"."""
    train: Any = {"torch": train_torch, "nnx": train_nnx, "keras": train_keras}[framework]
    path = Path(FOLDER.name) / "run"
    train(kind, path, optimizer, **{"steps": 30, "dtype": "float32", "seed": 0, **options})
    return Trace.load(path)
