"""What the layers of a model are given and give in a forward pass, for traces.

Keras has no hooks. So while steps are recorded, each layer has a `call` of its own around that of its class.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from ada2ms.core.state import Names
from ada2ms.core.trace import TraceError
from ada2ms.core.trace.outputs import MODEL, Activation, Output, activation, called, tensors


class Outputs:
    """Notes the inputs and outputs of the layers of a model, from when it is made until `remove`.

    If a layer was called with `training=True` before a step, its calls without it do not count; those with
    `training=False` only if there are no others. Of a layer with an activation function of its own, such as
    `Dense(8, "relu")`, the output is what it gives to that function, which is a module of its own elsewhere.

    Args:
        model: the layers.
        names: neutral names of the variables, from which those of the layers follow.

    Attributes:
        is_open: whether calls are looked at.
    """

    def __init__(self, model: keras.Model, names: Names) -> None:
        self.is_open = True
        self._passes: list[_Pass] = []  # of the step that comes
        self._depth = 0
        self._seen: dict[int, tuple[Any, Activation]] = {}  # of a pass
        self._called = False
        self._wrapped: list[tuple[keras.Layer, Any, Any]] = []  # layers, with what their `call` is and was
        for name, layer in named_layers(model, names):
            before, own = vars(layer).get("call"), self._around(name, layer, layer.call)
            vars(layer)["call"] = own  # past Keras' own tracking of attributes
            self._wrapped.append((layer, own, before))

    def take(self, note: Callable[[Output], None]) -> None:
        """Gives the outputs since the last time.

        Raises:
            TraceError: no layer has been called so far.
        """
        trained = {id(each.layer) for each in self._passes if each.training}
        counts = [each.training or (each.training is None and id(each.layer) not in trained) for each in self._passes]
        taken = [each for each, does in zip(self._passes, counts, strict=True) if does] or self._passes
        self._called |= any(each.outputs for each in taken)
        if not self._called:
            raise TraceError(
                "No layer of the model was called before this step, eagerly (with outputs=True give the recorder the "
                "model whose layers are called)"
            )
        for each in taken:
            for output in each.outputs:
                note(output)
        self._passes = []

    def remove(self) -> None:
        """Gives the layers back their own `call`."""
        for layer, own, before in reversed(self._wrapped):
            if vars(layer).get("call") is own:
                del vars(layer)["call"]
                if before is not None:
                    vars(layer)["call"] = before
        self._wrapped = []

    def _around(self, name: str, layer: keras.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        function = getattr(layer, "activation", None) if layer.weights and not _is_recurrent(layer) else None

        def observed(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                if not (self.is_open and _is_differentiated()):
                    return call(*args, **kwargs)
                self._passes.append(_Pass(layer, kwargs.get("training"), []))
            outputs, given = self._passes[-1].outputs, self._read((args, kwargs))
            before = len(outputs)
            inside: list[Any] = []  # what the layer's own activation function is given
            self._depth += 1
            try:
                if callable(function):
                    with _Seeing(layer, function, inside):
                        result = call(*args, **kwargs)
                else:
                    result = call(*args, **kwargs)
            finally:
                self._depth -= 1
            if found := self._read(inside if len(inside) == 1 else result):
                outputs.append(Output(name, found, given, composed=len(outputs) > before))
            if not self._depth:
                self._seen = {}
            return result

        return observed

    def _read(self, result: Any) -> list[Activation]:
        """What is kept of tensors that have values; of one that goes from layer to layer, computed once."""
        found = []
        for x in _tensors(result):
            if id(x) not in self._seen:
                array = _values(x)
                if array is None:
                    continue
                self._seen[id(x)] = x, activation(array, str(keras.backend.standardize_dtype(x.dtype)))
            found.append(self._seen[id(x)][1])
        return found


class _Pass(NamedTuple):
    """A call of an outermost layer: whether for training, if that was said, and what was computed in it."""

    layer: keras.Layer
    training: bool | None
    outputs: list[Output]


class _Seeing:
    """While it is entered, a layer's activation function notes what it is given."""

    def __init__(self, layer: keras.Layer, function: Callable[..., Any], seen: list[Any]) -> None:
        def noting(x: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(x)
            return function(x, *args, **kwargs)

        self._attributes, self._noting = vars(layer), noting
        self._before = self._attributes.get("activation")  # not there where torch has it among its modules

    def __enter__(self) -> None:
        self._attributes["activation"] = self._noting

    def __exit__(self, *_: object) -> None:
        del self._attributes["activation"]
        if self._before is not None:
            self._attributes["activation"] = self._before


def named_layers(model: keras.Model, names: Names) -> Iterator[tuple[str, keras.Layer]]:
    """Layers by what the neutral names of their variables begin with, each name for the innermost; of others by their
    paths. But no cells of recurrent layers, which are called for each time step."""
    every = list(model._flatten_layers())  # Keras has no public way to ask for layers within layers
    cells = {id(cell) for each in every if _is_recurrent(each) for cell in each._flatten_layers(include_self=False)}
    known = {v.path for v in model.trainable_variables} if callable(names) else set(names or {})
    found, taken = [], set()
    for layer in reversed([each for each in every if id(each) not in cells]):
        name = called([v.path for v in layer.weights if v.path in known], names)
        path = MODEL if layer is model else layer.path or layer.name
        found.append((name if name and name not in taken else path, layer))
        taken.add(name)
    yield from reversed(found)


def _is_recurrent(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.RNN)


def _tensors(x: Any) -> Iterator[Any]:
    """Of a layer's arguments or result, but no places in a graph."""
    return tensors(x, _is_tensor)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, np.ndarray) or (ops.is_tensor(x) and not isinstance(x, keras.KerasTensor))


def _is_differentiated() -> bool:
    """Whether a gradient may be wanted; on torch it is not where Keras builds a model, which there has values, too."""
    if keras.backend.backend() != "torch":
        return True
    import torch

    return torch.is_grad_enabled()


def _values(x: Any) -> Any:
    """As an array of NumPy; None where it is but a place in a graph, as where models are built."""
    backend = "numpy" if isinstance(x, np.ndarray) else keras.backend.backend()
    if backend == "tensorflow" and not hasattr(x, "numpy"):
        return None
    if backend == "jax":
        import jax

        x = ops.stop_gradient(x)  # JAX is differentiating it: only without gradient has it a value
        if isinstance(x, jax.core.Tracer):
            return None
    return x if backend == "numpy" else np.asarray(ops.convert_to_numpy(x))


def output(name: str, x: Any) -> Output:
    """Of what a user records.

    Raises:
        TraceError: it has no value, in a graph.
        TypeError: it is no tensor.
    """
    found = list(_tensors(x))
    if not found:
        raise TypeError(f"Invalid x: {type(x).__name__} (must be a tensor, or a tuple, list or dictionary of tensors)")
    arrays = [(_values(each), str(keras.backend.standardize_dtype(each.dtype))) for each in found]
    if any(array is None for array, _ in arrays):
        raise TraceError("A Recorder needs steps that run eagerly: model.compile(..., run_eagerly=True), and no remat")
    return Output(name, [activation(*each) for each in arrays])
