"""What the modules of a model are given and give in a forward pass, for traces: by forward hooks."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ada2ms.core.state import Names
from ada2ms.core.trace import TraceError
from ada2ms.core.trace.outputs import MODEL, Activation, Output, activation, called, tensors
from ada2ms.torch.numbers import numpy


class Outputs:
    """Notes the inputs and outputs of all modules of a model, from when it is made until `remove`.

    A forward pass counts whose outermost module is called with gradients enabled, and not within a backward pass, where
    checkpoints compute again what they have not kept; so evaluation under `torch.no_grad` does not. If a module was
    called in training mode before a step, its calls in evaluation mode do not count.

    Args:
        model: the modules.
        names: neutral names of the parameters, from which those of the modules follow.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self._passes: list[_Pass] = []  # of the step that comes
        self._calls: list[_Call] = []  # that have begun and not ended
        self._seen: dict[int, _Seen] = {}
        self._called = False
        # Each is a break in the graph of a compiled module, which must not trace them.
        disable: Any = torch.compiler.disable
        before, after = disable(self._before), disable(self._after)
        self._hooks = []
        for name, module in named_modules(model, names):
            self._hooks.append(module.register_forward_pre_hook(_Hook(before), with_kwargs=True))
            named = _Hook(partial(after, name))
            self._hooks.append(module.register_forward_hook(named, with_kwargs=True, always_call=True))

    def take(self, note: Callable[[Output], None]) -> None:
        """Gives the outputs since the last time.

        Raises:
            TraceError: no module has been called so far.
        """
        trained = {id(each.module) for each in self._passes if each.training}
        taken = [each for each in self._passes if each.training or id(each.module) not in trained]
        self._called |= bool(taken)
        if not self._called:
            raise TraceError(
                "No module was called before this step, with gradients enabled (with outputs=True make the recorder "
                "before a compiled model is first called, and give it the model whose modules are called)"
            )
        for each in taken:
            for output in each.outputs:
                note(output)
        self._passes, self._seen = [], {}

    def remove(self) -> None:
        """Takes the hooks out."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._calls:
            if not torch.is_grad_enabled() or _is_in_backward():
                return
            self._passes.append(_Pass(module, module.training, []))
        self._calls.append(_Call(module, self._read((args, kwargs)), len(self._passes[-1].outputs)))

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not any(each.module is module for each in self._calls):
            return
        while (call := self._calls.pop()).module is not module:
            pass  # one that an error has ended
        outputs = self._passes[-1].outputs
        if found := self._read(result):
            outputs.append(Output(name, found, call.given, module.training, composed=len(outputs) > call.before))

    def _read(self, result: Any) -> list[Activation]:
        """What is kept of tensors; of one that went from module to module, computed once."""
        found = []
        for x in _tensors(result):
            seen = self._seen.get(id(x))
            if seen is None or seen.tensor() is not x or seen.version != _version(x):
                seen = self._seen[id(x)] = _Seen(weakref.ref(x), _version(x), _activation(x))
            found.append(seen.activation)
        return found


class _Hook:
    """A hook of this model alone: copies of the model, and pickled ones, have one that does nothing in its place."""

    def __init__(self, note: Callable[..., None]) -> None:
        self._note = note

    def __call__(self, *args: Any) -> None:
        self._note(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    pass


class _Pass(NamedTuple):
    """A call of an outermost module: whether in training mode, and what was computed in it."""

    module: nn.Module
    training: bool
    outputs: list[Output]


class _Call(NamedTuple):
    """What a module is given, and how many outputs there are before its own."""

    module: nn.Module
    given: list[Activation]
    before: int


class _Seen(NamedTuple):
    tensor: "weakref.ref[Tensor]"
    version: int
    activation: Activation


def named_modules(model: nn.Module, names: Names) -> Iterator[tuple[str, nn.Module]]:
    """Modules by what the neutral names of their own parameters begin with; of others by their paths."""
    taken: set[str] = set()
    for path, module in model.named_modules():
        own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        name = called(own, names)
        yield (name if name and name not in taken else path or MODEL), module
        taken.add(name)


def _is_in_backward() -> bool:
    # torch has no public way to ask this; its own checkpoints ask so.
    return bool(torch._C._current_graph_task_id() != -1)


def _tensors(x: Any) -> Iterator[Tensor]:
    """Of a module's arguments or result, but no nested ones."""
    return (each for each in tensors(x, lambda each: isinstance(each, Tensor)) if not each.is_nested)


def _version(x: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return -1 if x.is_inference() else x._version


def _activation(x: Tensor) -> Activation:
    whole = x.full_tensor() if hasattr(x, "full_tensor") else x
    # torch has no public way to ask whether a tensor is one of torch.func, whose numbers are within another.
    if whole.is_meta or type(whole).__name__ == "FakeTensor" or torch._C._functorch.is_functorch_wrapped_tensor(whole):
        raise TraceError(
            f"The outputs of modules cannot be read within torch.func, on the meta device, or of fake tensors (here "
            f"of shape {tuple(x.shape)}): call the model so outside of the recorder, or record without outputs=True"
        )
    return activation(numpy(whole), str(x.dtype).removeprefix("torch."))


def output(name: str, x: Any) -> Output:
    """Of what a user records."""
    found = list(_tensors(x))
    if not found:
        raise TypeError(f"Invalid x: {type(x).__name__} (must be a tensor, or a tuple, list or dictionary of tensors)")
    return Output(name, [_activation(each) for each in found])
