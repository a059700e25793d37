"""Twins: the same small model in each framework, with Ada2MS, which trains in float64."""

import os
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from handoff_making import Row
from handoff_support import FRAMEWORKS, LR

from ada2ms.core import State
from support import settings

Array = Any
# On torch, Keras multiplies float64 in float32; on JAX, it trains in it.
EXACT = os.environ["KERAS_BACKEND"] == "tensorflow"
Build = Callable[[], Any]


@contextmanager
def precision(dtype: str) -> Any:
    with ExitStack() as stack:
        for framework in FRAMEWORKS:
            stack.enter_context(settings(framework, dtype, "cpu"))
        yield


class Twin:
    """A model of one framework; `options` are those of Ada2MS that all call the same."""

    def __init__(self, framework: str, row: Row, **options: Any) -> None:
        self.framework, self.dtype, self.trained = framework, row.dtype if EXACT else "float32", row.trained
        self.given, build = row.given.get(framework, {}), row.build[framework]
        make = {"torch": self._torch, "jax": self._jax, "keras": self._keras}[framework]
        with precision(self.dtype):
            make(build, options)

    def export_state(self) -> State:
        with precision(self.dtype):
            return self._export()

    def import_state(self, state: State) -> Any:
        with precision(self.dtype):
            return self._import(state)

    def step(self, x: Array, y: Array) -> None:
        """One step on the mean squared error."""
        with precision(self.dtype):
            self._step(self._cast(x), self._cast(y))

    def __call__(self, x: Array) -> Array:
        with precision(self.dtype):
            return np.asarray(self._forward(self._cast(x)))

    def _cast(self, array: Array) -> Array:
        return array.astype(self.dtype) if array.dtype.kind == "f" else array

    def _torch(self, build: Build, options: dict[str, Any]) -> None:
        import torch

        from ada2ms.torch import Ada2MS, export_state, import_state, plain_layers

        model = build().to(getattr(torch, self.dtype))
        optimizer = Ada2MS([p for p in model.parameters() if p.requires_grad], lr=LR, **options)

        def step(x: Array, y: Array) -> None:
            optimizer.zero_grad()
            ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()
            optimizer.step()

        self.model, self._step = model, step
        self._forward = lambda x: model(torch.tensor(x)).detach().numpy()
        self._export = lambda: export_state(model, optimizer, **plain_layers(model, **self.given))
        self._import = lambda state: import_state(model, optimizer, state, **plain_layers(model, **self.given))

    def _jax(self, build: Build, options: dict[str, Any]) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from ada2ms.jax import ada2ms, export_state, import_state, plain_layers

        model = build()
        rule = ada2ms(LR, **options)
        kinds = getattr(nnx, self.trained), nnx.Param
        graph, params, frozen, rest = nnx.split(model, *kinds, ...)
        params, frozen = (jax.tree.map(lambda x: x.astype(jnp.dtype(self.dtype)), x) for x in (params, frozen))
        self.model, self.state, mappings = model, rule.init(params), plain_layers(model, **self.given)
        self.params = params, frozen, rest

        def loss(params: Any, frozen: Any, rest: Any, x: Array, y: Array) -> Any:
            return ((nnx.merge(graph, params, frozen, rest, copy=True)(x) - y) ** 2).mean()

        @jax.jit
        def update(params: Any, state: Any, frozen: Any, rest: Any, x: Array, y: Array) -> Any:
            updates, state = rule.update(jax.grad(loss)(params, frozen, rest, x, y), state, params)
            return jax.tree.map(lambda p, u: p + u, params, updates), state

        def step(x: Array, y: Array) -> None:
            params, frozen, rest = self.params
            params, self.state = update(params, self.state, frozen, rest, x, y)
            self.params = params, frozen, rest

        def imported(state: State) -> Any:
            params, frozen, rest = self.params
            params, self.state, report = import_state(nnx.merge_state(params, frozen), self.state, state, **mappings)
            self.params = *nnx.split_state(params, *kinds), rest
            return report

        self._step, self._import = step, imported
        forward = jax.jit(lambda params, x: nnx.merge(graph, *params, copy=True)(x))
        self._forward = lambda x: forward(self.params, x)
        self._export = lambda: export_state(nnx.merge_state(*self.params[:2]), self.state, **mappings)

    def _keras(self, build: Build, options: dict[str, Any]) -> None:
        import keras

        from ada2ms.tf import Ada2MS, export_state, import_state, plain_layers

        model = build()
        optimizer = Ada2MS(LR, **options)
        eager = keras.backend.backend() != "jax"
        model.compile(optimizer, loss="mse", run_eagerly=eager, jit_compile=not eager)
        optimizer.build(model.trainable_variables)
        self.model, self._step = model, model.train_on_batch
        self._forward = lambda x: keras.ops.convert_to_numpy(model(x))
        self._export = lambda: export_state(model, optimizer, **plain_layers(model, **self.given))
        self._import = lambda state: import_state(model, optimizer, state, **plain_layers(model, **self.given))


def in_mid_run(state: State, seed: int = 0) -> State:
    """A state of another place in the training: no value is 0, and none is another's."""
    rng = np.random.default_rng(seed)
    tensor = state.scope == "tensor"
    for name in sorted(state.parameters):
        entry = state.parameters[name]
        shape = entry.exp_avg.shape
        dtype = entry.exp_avg.dtype
        entry.param = np.asarray(rng.standard_normal(shape) * 0.3, dtype)
        entry.exp_avg = np.asarray(rng.standard_normal(shape) * 0.01, dtype)
        entry.exp_avg_sq = np.asarray(rng.random(shape) * 1e-3 + 1e-4, dtype)
        entry.step = 5
        if tensor:
            entry.global_exp_avg_sq = float(rng.random()) * 1e-3
    for group in state.groups:
        group.global_exp_avg_sq, group.global_step = None if tensor else 5e-4, 5
    return state
