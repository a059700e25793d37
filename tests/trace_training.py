"""One small training script in each framework, with room for planted faults: what `ada2ms trace` is tested with.

A network of 12 inputs, two hidden layers with a LayerNorm between them, and 4 classes; the same weights and batches
everywhere. Each function trains and writes a trace; its keyword arguments are the faults.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 8, 8, 12, 16, 4
NAMES = (
    "0.dense.kernel",
    "0.dense.bias",
    "1.norm.scale",
    "1.norm.bias",
    "2.dense.kernel",
    "2.dense.bias",
    "3.dense.kernel",
    "3.dense.bias",
)
LR, DECAY = 1e-2, 1e-2


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """By neutral names; kernels are (inputs, outputs)."""
    rng = np.random.default_rng(seed)
    shapes = [
        (INPUTS, HIDDEN),
        (HIDDEN,),
        (HIDDEN,),
        (HIDDEN,),
        (HIDDEN, HIDDEN),
        (HIDDEN,),
        (HIDDEN, CLASSES),
        (CLASSES,),
    ]
    found = {
        name: rng.normal(size=shape) / math.sqrt(shape[0]) if len(shape) > 1 else 0.1 * rng.normal(size=shape)
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    found["1.norm.scale"] += 1
    return {name: x.astype(np.float32) for name, x in found.items()}


def batches(
    seed: int = 1,
    *,
    steps: int = STEPS,
    shift: int = 0,
    shuffle: int | None = None,
    scale: float = 1.0,
    labels_rolled: bool = False,
    within: bool = False,
    size: int = BATCH,
    features: int = 1,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels of each step; the labels can be learned."""
    rng = np.random.default_rng(seed)
    found = []
    teacher = np.random.default_rng(9).normal(size=(INPUTS, CLASSES))
    for _ in range(steps + 4):
        x = rng.normal(size=(BATCH, INPUTS)).astype(np.float32)
        y = np.argmax(x @ teacher, 1)
        found.append((x, y))
    found = found[shift : shift + steps]
    if shuffle is not None:
        found = [found[k] for k in np.random.default_rng(shuffle).permutation(len(found))]
    if within:
        found = [(x[::-1].copy(), y[::-1].copy()) for x, y in found]
    found = [(x[:, ::features].copy(), y) for x, y in found]
    return [(x[:size] * np.float32(scale), np.roll(y, 1)[:size] if labels_rolled else y[:size]) for x, y in found]


def rate(step: int, *, schedule: str = "constant", off: int = 0, epoch: int = 1) -> float:
    """The learning rate of a step, counted from 0."""
    k = step // epoch + off
    return LR if schedule == "constant" else LR * (min(k + 1, 3) / 3 if schedule == "warmup" else 0.9**k)


@dataclass
class Torch:
    """The options of the script in torch."""

    optimizer: Callable[[Any], Any] | None = None
    seed: int = 0
    data: dict[str, Any] | None = None
    schedule: str = "constant"
    off: int = 0
    reduction: str = "mean"
    accumulate: int = 1
    forget_division: bool = False
    scale: float = 1.0
    clip: float | None = None
    norm_eps: float = 1e-5
    batch_norm: dict[str, Any] | None = None  # of a BatchNorm in place of the LayerNorm
    dropout: float = 0.0
    activation: str = "tanh"
    frozen: tuple[str, ...] = ()
    detach: bool = False
    autocast: bool = False
    dtype: str = "float32"
    transposed: str = ""
    report: Callable[[Any], Any] | None = None
    skip: int | None = None
    clamp: float | None = None
    smoothing: float = 0.0
    reset_at: int | None = None
    wrong_from: tuple[int, float] | None = None
    gradient_noise: float = 0.0
    full: int = 3
    steps: int = STEPS
    zero: bool = True
    epoch: int = 1
    made: Callable[[Any], Any] | None = None  # the optimizer, of the network
    loss: Callable[[Any, Any, Any], Any] | None = None  # of the network, logits and labels
    before: Callable[[Any, int], None] | None = None  # what is done to the network's gradients before a step
    after: Callable[[Any, Any, int], None] | None = None  # what is done to network and optimizer after it
    start: Callable[[Any], None] | None = None  # what is done to the network before all
    narrow: str = ""  # a layer that computes in bfloat16
    told: Callable[[Any], Any] | None = None  # of the labels, what the recorder is told
    scaler: Callable[[], Any] | None = None
    outputs: bool = False


def train_torch(path: Path, **options: Any) -> Path:
    import torch

    from ada2ms.torch import Recorder, plain_layers

    o = Torch(**options)
    torch.manual_seed(0)
    net = _network(o)
    if o.start is not None:
        o.start(net)
    make = o.optimizer or (lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=DECAY))
    opt = make(net.parameters()) if o.made is None else o.made(net)
    shares = [group["lr"] / LR for group in opt.param_groups]
    scaler = None if o.scaler is None else o.scaler()
    with Recorder(path, net, opt, full=o.full, flush=3, outputs=o.outputs, **plain_layers(net)) as recorder:
        for i, (x, y) in enumerate(batches(steps=o.steps, **(o.data or {}))):
            for group, share in zip(opt.param_groups, shares, strict=True):
                group["lr"] = rate(i, schedule=o.schedule, off=o.off, epoch=o.epoch) * share
                if o.wrong_from is not None and i >= o.wrong_from[0]:
                    group["lr"] *= o.wrong_from[1]
            if o.reset_at == i:
                opt.state.clear()
            if o.zero:
                opt.zero_grad()
            xs, ys = torch.from_numpy(x).to(getattr(torch, o.dtype)), torch.from_numpy(y)
            _gradients(o, net, recorder, xs, ys, scaler)
            if o.skip == i:
                continue
            if o.clip is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip)
            if o.before is not None:
                o.before(net, i)
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
            if o.after is not None:
                with torch.no_grad():
                    o.after(net, opt, i)
            if o.clamp is not None:
                with torch.no_grad():
                    net[2].weight.clamp_(-o.clamp, o.clamp)
    return path


def _network(o: Torch) -> Any:
    import torch
    from torch import nn

    from ada2ms.torch import plain_layers

    norm = nn.LayerNorm(HIDDEN, eps=o.norm_eps)
    if o.batch_norm is not None:
        norm = nn.BatchNorm1d(HIDDEN, eps=o.norm_eps, **o.batch_norm)
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), norm, nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, CLASSES))
    names, start = plain_layers(net)["names"], weights(o.seed)
    with torch.no_grad():
        for own, p in net.named_parameters():
            value = torch.from_numpy(start[names[own]])
            p.copy_(value.T if value.ndim == 2 and names[own] != o.transposed else value)
            p.requires_grad_(names[own] not in o.frozen)
    return net.to(getattr(torch, o.dtype))


def _gradients(o: Torch, net: Any, recorder: Any, x: Any, y: Any, scaler: Any) -> None:
    import torch
    from torch.nn import functional

    act = {
        "tanh": torch.tanh,
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu by tanh": lambda h: functional.gelu(h, approximate="tanh"),
    }[o.activation]
    for xs, ys in zip(x.chunk(o.accumulate), y.chunk(o.accumulate), strict=True):
        recorder.batch(xs, ys if o.told is None else o.told(ys))
        with torch.autocast("cpu", torch.bfloat16) if o.autocast else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16) if o.narrow == "0" else contextlib.nullcontext():
                h = net[0](xs)
            h = act(net[1](h.to(xs.dtype)))
            h = functional.dropout(h.detach() if o.detach else h, o.dropout)
            logits = net[3](torch.tanh(net[2](h))).float()
            loss = functional.cross_entropy(logits, ys, reduction=o.reduction, label_smoothing=o.smoothing)
            loss = loss if o.loss is None else o.loss(net, logits, ys)
        recorder.loss(loss.detach() if o.report is None else o.report(loss.detach()))
        loss = loss * o.scale / (1 if o.forget_division else o.accumulate)
        (loss if scaler is None else scaler.scale(loss)).backward()
    if o.gradient_noise:
        for p in net.parameters():
            p.grad += o.gradient_noise * p.grad.abs().mean() * torch.randn_like(p)


def _forward(p: Any, x: Any, axis: int, norm_eps: float, after_norm: Any, note: Any) -> Any:
    """Logits, and the statistics of the batch, in JAX."""
    import jax.numpy as jnp

    def dense(k: int, x: Any) -> Any:
        h = x @ p[f"{k}.dense.kernel"] + p[f"{k}.dense.bias"]
        note(f"{k}.dense", h)
        return h

    h = dense(0, x)
    batch = {"1.norm.mean": h.mean(axis), "1.norm.var": h.var(axis)}
    h = (h - h.mean(axis, keepdims=True)) / jnp.sqrt(h.var(axis, keepdims=True) + norm_eps)
    h = h * p[NAMES[2]] + p[NAMES[3]]
    note("1.norm", h)
    return dense(3, jnp.tanh(dense(2, after_norm(jnp.tanh(h))))), batch


def train_jax(
    path: Path,
    *,
    optimizer: Any = None,
    hyper: dict[str, Any] | None = None,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    reduction: str = "mean",
    norm_eps: float = 1e-5,
    transposed: str = "",
    stop: bool = False,
    steps: int = STEPS,
    halves: int = 1,
    keeps: float | None = None,
    outputs: bool = False,
) -> Path:
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import Recorder, recorded

    params = {name: jnp.asarray(x.T if name == transposed else x) for name, x in weights(seed).items()}
    if optimizer is None:
        optimizer, hyper = (
            optax.adamw(LR, weight_decay=DECAY),
            {"lr": LR, "weight_decay": DECAY, "b1": 0.9, "b2": 0.999, "eps": 1e-8},
        )

    axis = -1 if keeps is None else 0  # of a LayerNorm, or a BatchNorm, whose statistics keep so much of the old
    seen = None if keeps is None else {"1.norm.mean": jnp.zeros(HIDDEN), "1.norm.var": jnp.ones(HIDDEN)}

    def loss_of(p: Any, x: Any, y: Any) -> Any:
        note = recorder.output if outputs else lambda *_: None
        logits, batch = _forward(p, x, axis, norm_eps, jax.lax.stop_gradient if stop else lambda h: h, note)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return (losses.sum() if reduction == "sum" else losses.mean()), batch

    with Recorder(path, params, statistics=seen, hyper=hyper, optimizer="optax.adamw") as recorder:
        opt = recorded(optimizer, recorder)
        state = opt.init(params)

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            (loss, batch), grads = jax.value_and_grad(loss_of, has_aux=True)(params, x, y)
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss, batch

        for whole in batches(steps=steps, **(data or {})):
            for x, y in zip(*(np.split(part, halves) for part in whole), strict=True):
                recorder.batch(x, y)
                params, state, loss, batch = step(params, state, x, y)
                recorder.loss(loss)
                if seen is not None:
                    seen = jax.tree.map(lambda old, new: keeps * old + (1 - keeps) * new, seen, batch)
                    recorder.statistics(seen)
    return path


def train_keras(
    path: Path,
    *,
    optimizer: Any = None,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    norm_eps: float = 1e-5,
    reduction: str = "sum_over_batch_size",
    copied: bool = True,
    steps: int = STEPS,
    batch_norm: dict[str, Any] | None = None,
    outputs: bool = False,
) -> Path:
    import keras

    from ada2ms.tf import Recorder, plain_layers

    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    layers = [
        keras.Input((INPUTS,)),
        dense(HIDDEN),
        keras.layers.LayerNormalization(epsilon=norm_eps)
        if batch_norm is None
        else keras.layers.BatchNormalization(epsilon=norm_eps, **batch_norm),
        keras.layers.Activation("tanh"),
        dense(HIDDEN, "tanh"),
        dense(CLASSES),
    ]
    model = keras.Sequential(layers)
    mappings, start = plain_layers(model), weights(seed)
    for v in model.trainable_variables if copied else []:
        v.assign(start[mappings["names"][v.path]])
    opt = optimizer or keras.optimizers.AdamW(LR, weight_decay=DECAY, epsilon=1e-8)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile(opt, loss, run_eagerly=True)
    x, y = (np.concatenate(arrays) for arrays in zip(*batches(steps=steps, **(data or {})), strict=True))
    with Recorder(path, model, outputs=outputs, **mappings) as recorder:
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[recorder])
    return path
