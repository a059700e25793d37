"""Records what a run does, for `ada2ms trace`: any Keras optimizer, on any Keras backend.

from ada2ms.tf import Recorder, plain_layers

model.compile(optimizer="adamw", loss="mse", run_eagerly=True)
with Recorder("run.trace", model, **plain_layers(model)) as recorder:
    model.fit(x, y, callbacks=[recorder])
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from ada2ms.core.hyperparameters import value_at
from ada2ms.core.state import Axes, Extras, Names
from ada2ms.core.trace import Step, TraceError, Writer, native
from ada2ms.core.trace.model import Observed, flattened, moving, observed, resolve, sample
from ada2ms.core.trace.native import Sketcher
from ada2ms.core.trace.sketch import WIDTH, change
from ada2ms.core.trace.writer import DEFAULT_ENTRIES, DEFAULT_FLUSH, DEFAULT_FULL
from ada2ms.tf.groups import Hyper
from ada2ms.tf.optimizer import Ada2MS
from ada2ms.tf.outputs import Outputs, output

_HYPER = {  # Keras' names of hyperparameters, and the neutral ones
    "beta_1": "b1",
    "beta_2": "b2",
    "epsilon": "eps",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "rho": "rho",
    "amsgrad": "amsgrad",
    "clipnorm": "clipnorm",
    "global_clipnorm": "global_clipnorm",
    "clipvalue": "clipvalue",
}


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes a trace of a run while it goes on; a context manager, and a callback for `fit`.

    Of every update: loss and batch; hyperparameters; and of each variable sketches of its value, of its gradient as the
    rule gets it (unscaled, the mean of those that it accumulates, and clipped if the optimizer clips), and of the
    update, for the first steps with entries of the arrays themselves. Sketches are made in the host's memory.

    As a callback it takes batches and losses from `fit`. In a loop of your own call `batch` and `loss`. Either way the
    steps must run eagerly: `model.compile(..., run_eagerly=True)`; on torch they do.

    Args:
        path: of the trace; one that is there is replaced.
        model: compiled; or any, if the optimizer is given.
        optimizer: the one to record; by default the model's.
        names: the neutral name of a variable, for each path here, as a mapping or a function; those left out keep their
            paths. `plain_layers` has them, and the next two.
        axes: for a path here, how an array of the neutral layout is transposed to have this layout, or a function that
            cuts an array here into those of the neutral layout, which are then parameters of their own.
        extras: the neutral name of a variable that is not trained, such as a running mean, for each path here. Those of
            floating point are recorded, as they are when the recorder is made and then after each step.
        full: of how many steps to keep entries of the arrays as well.
        entries: how many entries of each array; of larger ones a sample.
        flush: after how many steps to write; a run that is killed loses at most these.
        outputs: whether to record, in the first `full` steps, what each layer is given and what it gives, so that the
            first that differs can be named. Then they take longer.

    Raises:
        TraceError: names or axes do not fit, or there is no optimizer.
        ValueError: naming the argument, its value and what is allowed.
        FileExistsError: the path is of another kind of file.
    """

    def __init__(
        self,
        path: str | Path,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None = None,
        *,
        names: Names = None,
        axes: Axes = None,
        extras: Extras = None,
        full: int = DEFAULT_FULL,
        entries: int = DEFAULT_ENTRIES,
        flush: int = DEFAULT_FLUSH,
        outputs: bool = False,
    ) -> None:
        super().__init__()
        optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if optimizer is None:
            raise TraceError("The model has no optimizer (compile it first, or give the optimizer)")
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
        self._model = model
        shapes = {v.path: (tuple(v.shape), _dtype(v), 0) for v in model.trainable_variables}
        self.parameters = resolve(shapes, names, axes, [v.path for v in model.variables])
        self._moving = {v.path: v for v in _moving(model)}
        kept = {path: (tuple(v.shape), _dtype(v)) for path, v in self._moving.items()}
        self._statistics = moving(kept, extras, axes)
        if outputs and full == 0:
            raise ValueError("Invalid outputs: True (needs full of at least 1)")
        self._writer = Writer(path, full=full, entries=entries, flush=flush)
        self._start = self._observed()
        self._about = _about(self._optimizer)
        self._groups: list[_Group] = []  # known once the optimizer is built, in its first step
        self._sketcher = Sketcher()
        self._sum: dict[str, Any] = {}  # gradients that are accumulated, as the optimizer does
        self._apply, self._compute_loss = self._optimizer.apply, model.compute_loss
        self._optimizer.apply = self._recorded_apply
        self._in_fit = False
        self._outputs = Outputs(model, names) if outputs else None

    def batch(self, *arrays: Any) -> None:
        """Notes the arrays of a batch, of the step that comes."""
        self._writer.batch([_numpy(x) for x in flattened(arrays)])

    def loss(self, loss: Any) -> None:
        """Notes the loss of the step that comes; or, if a step has had no loss, of the last one."""
        value = float(_numpy(loss))
        self._writer.loss(lambda: value, late=True)

    def output(self, name: str, x: Any) -> None:
        """Notes an output of the forward pass of the step that comes, such as of a block, in the first `full` steps.

        Args:
            name: by which it is compared with that of another run; the second of a name in a step gets a number.
            x: a tensor, or a tuple, list or dictionary of tensors.
        """
        if self._writer.is_full:
            self._writer.output(output(name, x))

    def close(self) -> None:
        """Stops recording and writes what waits."""
        self._without_outputs()
        if vars(self._optimizer).get("apply") is not None:
            del self._optimizer.apply
        self.on_train_end()
        self._begin([])
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Makes sure that steps run eagerly, and begins to look at batches."""
        if keras.backend.backend() != "torch" and not self._model.run_eagerly:
            raise TraceError("A Recorder needs steps that run eagerly: model.compile(..., run_eagerly=True)")
        self._in_fit = True
        self._model.compute_loss = self._observed_loss

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops looking at batches."""
        if self._in_fit:
            self._in_fit = False
            del self._model.compute_loss

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Does not look at the forward passes of validation."""
        if self._outputs is not None:
            self._outputs.is_open = False

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        """Looks at forward passes again."""
        if self._outputs is not None:
            self._outputs.is_open = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes statistics where variables have them only now."""
        if self._moving and keras.backend.backend() == "jax":
            self._model.jax_state_sync()
            self._writer.statistics(self._observed)

    def _observed(self) -> Observed:
        arrays = {path: np.array(_array(v)) for path, v in self._moving.items()}
        return observed(self._statistics, arrays, self._writer.entries)

    def _observed_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch of `fit`, noted with the batch. JAX is differentiating it: only without gradient has it
        a value.
        """
        loss = self._compute_loss(*args, **kwargs)
        given = dict(zip(("x", "y", "y_pred", "sample_weight"), args, strict=False)) | kwargs
        arrays = [x for name in ("x", "y", "sample_weight") for x in _leaves(given.get(name))]
        self.batch(*arrays)
        value = float(_numpy(ops.stop_gradient(loss)))
        self._writer.loss(lambda: value)
        return loss

    def _recorded_apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        optimizer = self._optimizer
        grads = list(grads)
        if keras.backend.backend() == "jax" and any(_is_traced(g) for g in grads):
            raise TraceError("A Recorder needs steps that run eagerly: no jit, and no LossScaleOptimizer on JAX")
        given = list(optimizer._trainable_variables if trainable_variables is None else trainable_variables)
        values = {v.path: v for v in given}
        gradients = {v.path: None if g is None else _array(g) for v, g in zip(given, grads, strict=True)}
        every = optimizer.gradient_accumulation_steps or 1
        if every > 1:
            for path, g in gradients.items():
                before = self._sum.get(path)
                if g is not None:
                    self._sum[path] = np.array(g) if before is None else before + g
                else:
                    self._sum.setdefault(path, None)
            if (int(_numpy(optimizer._iterations)) + 1) % every:
                return self._apply(grads, trainable_variables)
            gradients = {path: None if g is None else g / every for path, g in self._sum.items()}
            self._sum = {}
        gradients = _clipped(optimizer, gradients)
        self._begin(given)
        hyper = [_hyper(optimizer, group) for group in self._groups]
        full = self._writer.is_full
        keeps = full or not native.is_available(sum(p.size for p in self.parameters))  # else nothing is copied
        before = {path: np.array(_array(v)) if keeps else _array(v) for path, v in values.items()}
        there = {path: np.array(g) if keeps else g for path, g in gradients.items() if g is not None}
        arrays = {"value": before, "gradient": there}
        sketches = self._sketches(arrays)
        result = self._apply(grads, trainable_variables)
        after = {path: _array(v) for path, v in values.items()}
        if keeps:
            arrays["update"] = {path: _difference(after[path], x) for path, x in before.items()}
            sketches |= self._sketches({"update": arrays["update"]})
        else:
            sketches["update"] = change(sketches["value"], self._sketches({"value": after})["value"])
        missing = np.array([p.own not in arrays["gradient"] for p in self.parameters], bool)
        self._add(Step(0, sketches, missing, hyper=hyper), arrays if full else {})
        if self._moving and keras.backend.backend() != "jax":
            self._writer.statistics(self._observed)
        return result

    def _begin(self, variables: list[Any]) -> None:
        """Writes what the trace is of, in the first step: which variables have hyperparameters of their own."""
        if self._groups:
            return
        if variables and not self._optimizer.built:
            self._optimizer.build(variables)
        of = {v.path: _group(self._optimizer, v) for v in variables}
        self._groups = list(dict.fromkeys(of.values())) or [_Group()]
        self.parameters = [
            replace(p, group=self._groups.index(of.get(p.own, self._groups[0]))) for p in self.parameters
        ]
        self._writer.begin(self._about, self.parameters, self._statistics, self._start)

    def _sketches(self, arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Of arrays by what they are and by path, (parameters, WIDTH); NaN for what is missing."""
        found = {what: np.full((len(self.parameters), WIDTH), np.nan) for what in arrays}
        each = [(what, i, p) for what in arrays for i, p in enumerate(self.parameters) if p.own in arrays[what]]
        rows = self._sketcher([p.of(arrays[what][p.own]) for what, _, p in each], [p.axes for _, _, p in each])
        for (what, i, _), row in zip(each, rows, strict=True):
            found[what][i] = row
        return found

    def _add(self, step: Step, full: Mapping[str, Mapping[str, Any]]) -> None:
        if self._writer.is_due:  # before, since the loss of this step may come after it
            self._writer.flush()
        for what, arrays in full.items():
            there = [p for p in self.parameters if p.own in arrays]
            step.full[what] = {p.name: sample(arrays[p.own], p, self._writer.entries) for p in there}
        if self._outputs is not None:
            self._outputs.take(self._writer.output)
        self._writer.add(step)
        if not self._writer.is_full:
            self._without_outputs()

    def _without_outputs(self) -> None:
        if self._outputs is not None:
            self._outputs.remove()
            self._outputs = None


def _moving(model: keras.Model) -> list[Any]:
    """What the layers keep that is never trained, such as running means; neither frozen weights, seeds nor counts."""
    # Keras has no public way to ask what of a frozen layer is trained at other times.
    weights = {id(v) for each in model._flatten_layers() for v in each._trainable_variables}
    return [v for v in model.non_trainable_variables if id(v) not in weights and "float" in _dtype(v)]


def _is_traced(x: Any) -> bool:
    import jax

    return isinstance(x, jax.core.Tracer)


def _clipped(optimizer: Any, gradients: dict[str, Any]) -> dict[str, Any]:
    """Gradients as the optimizer clips them before its rule, so that clipping elsewhere before a step is the same."""
    there = {path: g for path, g in gradients.items() if g is not None}
    if (bound := optimizer.clipnorm or 0.0) > 0:
        clipped = {path: g * _scale(bound, _norm(g)) for path, g in there.items()}
    elif (bound := optimizer.global_clipnorm or 0.0) > 0:
        scale = _scale(bound, math.hypot(*map(_norm, there.values())))
        clipped = {path: g * scale for path, g in there.items()}
    elif (bound := optimizer.clipvalue or 0.0) > 0:
        clipped = {path: np.clip(g, -bound, bound) for path, g in there.items()}
    else:
        return gradients
    return {**gradients, **clipped}


def _norm(x: Any) -> float:
    return float(np.linalg.norm(x.astype(np.result_type(x, np.float64))))


def _scale(bound: float, norm: float) -> float:
    """By what a gradient of this norm is multiplied; of one that is not finite nothing is left, as in Keras."""
    return bound / norm if norm > bound else 1.0 if norm <= bound else math.nan


def _difference(after: Any, before: Any) -> Any:
    wide = np.result_type(after, np.float32)
    return np.subtract(after, before, dtype=wide)


def _leaves(x: Any) -> list[Any]:
    if x is None:
        return []
    if isinstance(x, Mapping):
        return [leaf for key in sorted(x) for leaf in _leaves(x[key])]
    if isinstance(x, (list, tuple)):
        return [leaf for each in x for leaf in _leaves(each)]
    return [x]


class _Group(NamedTuple):
    """What hyperparameters a variable has: whether it decays, and for Ada2MS in which of its groups it is."""

    decays: bool = True
    own: int | None = None


def _group(optimizer: Any, variable: Any) -> _Group:
    decays = getattr(optimizer, "_use_weight_decay", None)  # Keras has no public way to ask what it excludes
    is_decaying = decays is None or bool(decays(variable))
    if not isinstance(optimizer, Ada2MS):
        return _Group(is_decaying)
    return _Group(is_decaying, optimizer._grouping.group_of.get(optimizer._get_variable_index(variable)))


def _hyper(optimizer: Any, group: _Group) -> dict[str, float]:
    """The numbers among the hyperparameters of a group, by neutral names."""
    found = {"lr": float(_numpy(optimizer.learning_rate))}
    for attribute, name in _HYPER.items():
        value = getattr(optimizer, attribute, None)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)
    if "weight_decay" not in found:
        found["weight_decay"] = 0.0
    if isinstance(optimizer, Ada2MS):
        count = int(np.ravel(_numpy(optimizer._global_step))[0]) if optimizer.built else 0  # the optimizer's own
        own = Hyper.of(optimizer, group.own)._asdict()
        found["lr"] *= own.pop("lr_scale")
        found |= {name: float(_numpy(value_at(value, count))) for name, value in own.items()}
    return found if group.decays else {**found, "weight_decay": 0.0}


def _about(optimizer: Any) -> dict[str, Any]:
    backend = keras.backend.backend()
    kind = type(optimizer)
    module = "keras.optimizers" if kind.__module__.startswith("keras.") else kind.__module__
    return {
        "framework": "keras",
        "source": f"keras {keras.__version__} on {backend}",
        "optimizer": f"{module}.{kind.__name__}",
        "started": bool(optimizer.built) and int(_numpy(optimizer.iterations)) > 0,
        "matmul": "default",
        "processes": 1,
    }


def _dtype(variable: Any) -> str:
    return str(keras.backend.standardize_dtype(variable.dtype))


def _array(x: Any) -> Any:
    """An array of NumPy, of at least float32; its memory may be shared with what changes."""
    x = _numpy(x)
    return x if x.dtype.itemsize >= 4 else x.astype(np.float32)


def _numpy(x: Any) -> Any:
    if hasattr(x, "indices") and hasattr(x, "values") and hasattr(x, "dense_shape"):  # IndexedSlices of TensorFlow
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
    value = getattr(x, "value", x) if isinstance(x, keras.Variable) else x
    if (
        type(value).__module__.startswith("torch")
        and value.device.type == "cpu"
        and str(value.dtype) == "torch.float32"
    ):
        return value.detach().numpy()  # where Keras would copy
    return np.asarray(ops.convert_to_numpy(value)) if hasattr(value, "dtype") else np.asarray(value)
