"""A model and Ada2MS in each framework, whose steps are recorded: with given gradients, or with the model's own."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from handoff_making import Row
from handoff_models import precision
from handoff_support import LR

from ada2ms.core import Receipt, State
from ada2ms.core.state import Report, Step

Array = Any


class Run:
    """`options` are those of Ada2MS that all call the same; `layers` replace what `plain_layers` gives."""

    def __init__(self, framework: str, row: Row, *, layers: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.framework, self.layers = framework, layers
        with precision("float64"):
            {"torch": self._torch, "jax": self._jax, "keras": self._keras}[framework](row.build[framework](), options)

    def export_state(self, receipt: Receipt | None = None) -> State:
        with precision("float64"):
            state: State = self._export(receipt)
        return state

    def import_state(self, state: State, **options: Any) -> Report:
        """With `loss`, gradients of the model are compared, of a function of its outputs for a number of a step."""
        with precision("float64"):
            if loss := options.pop("loss", None):
                options["gradients"] = self._gradients(loss)
            report: Report = self._import(state, **options)
        return report

    def step(self, gradients: Mapping[str, Array]) -> dict[str, Array]:
        """A step with gradients by this framework's names; those that are to be recorded."""
        with precision("float64"):
            found: dict[str, Array] = self._step(gradients)
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, by this framework's names."""
        return {name: tuple(x.shape) for name, x in self._named().items()}

    def record(self, steps: int, seed: int = 0, **options: Any) -> State:
        """The state after steps with gradients of random numbers, with a receipt of them."""
        receipt = Receipt(self.export_state())
        for i in range(steps):
            rng = np.random.default_rng([seed, i])
            found = self.step({name: rng.standard_normal(shape) for name, shape in sorted(self.shapes().items())})
            receipt.add(found, batch=bytes([i]), **options)
        return self.export_state(receipt)

    def record_model(self, steps: int, loss: Callable[..., Any]) -> State:
        """The state after steps with the model's own gradients, with a receipt of them."""
        receipt = Receipt(self.export_state())
        gradients = self._gradients(loss)
        for i in range(steps):
            with precision("float64"):
                found = self._by_name(gradients(self._current(), Step({}, batch=str(i))))
            receipt.add(self.step(found))
            receipt.steps[-1].batch = str(i)
        return self.export_state(receipt)

    def _torch(self, model: Any, options: dict[str, Any]) -> None:
        import torch

        from ada2ms.torch import (
            Ada2MS,
            export_gradients,
            export_state,
            import_state,
            param_groups,
            plain_layers,
        )

        model = model.to(torch.float64)
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = options.pop("groups", None)
        params = trained if groups is None else param_groups(model, groups, lr=LR)
        self.optimizer = optimizer = Ada2MS(params, **{"lr": LR, **options})
        layers = plain_layers(model) if self.layers is None else self.layers

        def step(gradients: Mapping[str, Array]) -> Any:
            for name, p in model.named_parameters():
                p.grad = torch.tensor(gradients[name]) if name in gradients else None
            found = export_gradients(model, optimizer, **layers)
            optimizer.step()
            return found

        def gradients_of(loss: Callable[..., Any]) -> Any:
            def gradients(model: Any, step: Step) -> Any:
                model.zero_grad()
                x, y = (torch.tensor(array) for array in loss(int(step.batch)))
                ((model(x) - y) ** 2).mean().backward()
                return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}

            return gradients

        self.model, self._step, self._gradients = model, step, gradients_of
        self._named = lambda: dict(model.named_parameters())
        self._current = lambda: model
        self._by_name = lambda gradients: gradients
        self._export = lambda receipt: export_state(model, optimizer, **layers, receipt=receipt)
        self._import = lambda state, **given: import_state(model, optimizer, state, **layers, **given)

    def _jax(self, model: Any, options: dict[str, Any]) -> None:
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        from ada2ms.jax import ada2ms, export_gradients, export_state, import_state, plain_layers
        from ada2ms.jax.names import by_path, flatten

        layers = plain_layers(model) if self.layers is None else self.layers
        injected = options.pop("injected", False)
        arguments = {"learning_rate": options.pop("lr", LR), **options}
        rule = (
            optax.inject_hyperparams(ada2ms, static_args=[*options])(**arguments) if injected else ada2ms(**arguments)
        )
        self.optimizer = optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)

        def params() -> Any:
            return nnx.state(model, nnx.Param)

        update = jax.jit(rule.update)
        pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # its name in flax 0.12.0

        def step(gradients: Mapping[str, Array]) -> Any:
            boxes, structure = flatten(params())
            tree = structure.unflatten(
                [jax.tree.map(lambda _, p=path: jnp.asarray(gradients[p]), x) for path, x in boxes]
            )
            found = export_gradients(tree, **layers)
            updates, new = update(*map(pure, (tree, optimizer.opt_state, params())))
            nnx.update(model, optax.apply_updates(pure(params()), updates))
            nnx.update(optimizer.opt_state, nnx.state(new))
            return found

        def gradients_of(loss: Callable[..., Any]) -> Any:
            def error(model: Any, x: Array, y: Array) -> Any:
                return ((model(x) - y) ** 2).mean()

            graph, _, rest = nnx.split(model, nnx.Param, ...)
            grad = jax.jit(jax.grad(lambda params, x, y: error(nnx.merge(graph, params, rest, copy=True), x, y)))
            return lambda params, step: grad(params, *loss(int(step.batch)))

        def imported(state: State, **given: Any) -> Report:
            if "verify" in given:
                given = {"optimizer": rule, **given}
            new, optimizer.opt_state, report = import_state(params(), optimizer.opt_state, state, **layers, **given)
            nnx.update(model, new)
            return report

        self.model, self._step, self._gradients, self._import = model, step, gradients_of, imported
        self._named = lambda: by_path(params())
        self._current = params
        self._by_name = lambda tree: {path: np.array(g) for path, g in by_path(tree).items()}
        self._export = lambda receipt: export_state(params(), optimizer.opt_state, **layers, receipt=receipt)

    def _keras(self, model: Any, options: dict[str, Any]) -> None:
        from keras import ops

        from ada2ms.tf import Ada2MS, export_gradients, export_state, import_state, plain_layers

        self.optimizer = optimizer = Ada2MS(**{"learning_rate": options.pop("lr", LR), **options})
        optimizer.build(model.trainable_variables)
        layers = plain_layers(model) if self.layers is None else self.layers

        def step(gradients: Mapping[str, Array]) -> Any:
            given = [ops.convert_to_tensor(gradients[v.path], v.dtype) for v in model.trainable_variables]
            optimizer.apply(given, model.trainable_variables)
            return export_gradients(model, given, **layers)

        def gradients_of(loss: Callable[..., Any]) -> Any:
            assert os.environ["KERAS_BACKEND"] == "tensorflow"
            import tensorflow as tf

            def gradients(model: Any, step: Step) -> Any:
                x, y = loss(int(step.batch))
                with tf.GradientTape() as tape:
                    error = ops.mean((model(x) - y) ** 2)
                return tape.gradient(error, [v.value for v in model.trainable_variables])

            return gradients

        self.model, self._step, self._gradients = model, step, gradients_of
        self._named = lambda: {v.path: v for v in model.trainable_variables}
        self._current = lambda: model
        self._by_name = lambda found: {
            v.path: ops.convert_to_numpy(g) for v, g in zip(model.trainable_variables, found, strict=True)
        }
        self._export = lambda receipt: export_state(model, optimizer, **layers, receipt=receipt)
        self._import = lambda state, **given: import_state(model, optimizer, state, **layers, **given)
