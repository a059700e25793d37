"""Records what a run does, for `ada2ms trace`: any optimizer of torch, by its own hooks.

from ada2ms.torch import Recorder, plain_layers

with Recorder("run.trace", model, optimizer, **plain_layers(model)) as recorder:
    for x, y in batches:
        recorder.batch(x, y)
        loss = loss_of(model(x), y)
        recorder.loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ada2ms.core.hyperparameters import value_at
from ada2ms.core.state import Axes, Extras, Names
from ada2ms.core.trace import Parameter, Step, TraceError, Writer
from ada2ms.core.trace.model import STATISTICS, TENSORS, empty_sketches, flattened, resolve, sample
from ada2ms.core.trace.parts import Part
from ada2ms.core.trace.sketch import change
from ada2ms.core.trace.writer import DEFAULT_ENTRIES, DEFAULT_FLUSH, DEFAULT_FULL
from ada2ms.torch.buffers import Buffers
from ada2ms.torch.groups import named_parameters
from ada2ms.torch.numbers import number, numpy
from ada2ms.torch.outputs import Outputs, output
from ada2ms.torch.processes import combine, is_first, world_size
from ada2ms.torch.shared import choice
from ada2ms.torch.sketches import Sketcher

_HOW = {"params", "foreach", "capturable", "differentiable", "fused", "param_names", "maximize"}  # no part of a rule


class Recorder:
    """Writes a trace of a run while it goes on; a context manager.

    Of every step: loss and batch, if told; the hyperparameters of each group; and of each parameter sketches of its
    value, of its gradient as the optimizer got it, and of the update, for the first steps with entries of the tensors
    themselves. With a `GradScaler` gradients are as unscaled; steps that it leaves out do not reach an optimizer, and
    show by the batches of two steps in one. With a closure the gradient is that of its first evaluation. Sharded
    parameters (`fully_shard`, tensor parallelism) are recorded as the whole that they are, in one small all-reduce; of
    several processes the first writes, and all must record.

    Sketches stay on the device until they are written. Outside the context nothing is recorded, and nothing costs.

    Args:
        path: of the trace; one that is there is replaced.
        model: the module, or its parameters by name.
        optimizer: any, over parameters of the model.
        names: the neutral name of a parameter, for each name here, as a mapping or a function; those left out keep
            their names. `plain_layers` has them, and the next two.
        axes: for a name here, how an array of the neutral layout is transposed to have this layout, or a function that
            cuts an array here into those of the neutral layout, which are then parameters of their own.
        extras: the neutral name of a buffer, such as a running mean, for each name here. Buffers of floating point that
            the module saves are recorded, as they are when the recorder is made and then in each step.
        full: of how many steps to keep entries of the tensors as well.
        entries: how many entries of each tensor; of larger ones a sample.
        flush: after how many steps to write; a run that is killed loses at most these.
        group: the processes among which batches are divided; by default all.
        outputs: whether to record, in the first `full` steps, what each module is given and what it gives, so that the
            first that differs can be named. Then they take longer, and a compiled model is compiled in pieces; make the
            recorder before the model is first called.

    Raises:
        TraceError: names or axes do not fit, or the model has not all of the optimizer's parameters.
        ValueError: naming the argument, its value and what is allowed.
        FileExistsError: the path is of another kind of file.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module | Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        names: Names = None,
        axes: Axes = None,
        extras: Extras = None,
        full: int = DEFAULT_FULL,
        entries: int = DEFAULT_ENTRIES,
        flush: int = DEFAULT_FLUSH,
        group: Any = None,
        outputs: bool = False,
    ) -> None:
        optimizer = _unwrapped(optimizer)
        inner, own = _inner(model), named(model)
        if outputs and (full == 0 or not isinstance(inner, nn.Module)):
            raise ValueError("Invalid outputs: True (needs a model that is a module, and full of at least 1)")
        self._group, self._world = group, world_size(group)
        self._params = [p for each in optimizer.param_groups for p in each["params"]]
        self._parameters = parameters(own, optimizer, names, axes)
        self._writer = Writer(path if is_first() else None, full=full, entries=entries, flush=flush)
        buffers = Buffers(inner, extras, axes) if isinstance(inner, nn.Module) else None
        self._buffers = buffers if buffers and buffers.parameters else None
        start = (buffers.parameters, buffers.observed(entries)) if buffers else ()
        self._writer.begin(_about(optimizer, self._world), self._parameters, *start)
        places = {name: i for i, name in enumerate(dict.fromkeys(p.own for p in self._parameters))}
        self._place = [places[p.own] for p in self._parameters]  # of each one's tensor in the optimizer's
        self._sketcher = Sketcher(cast("list[Tensor]", self._pieces(self._params)), self._parameters)
        self._kept: list[Tensor] = []  # sums of the steps that wait, on their device
        self._fetched: Iterator[NDArray[Any]] = iter(())  # and as they are written
        self._open: _Before | None = None
        self._outputs = Outputs(inner, names) if outputs else None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def batch(self, *arrays: Any) -> None:
        """Notes the arrays of a batch (tensors or anything that NumPy takes), of the step that comes."""
        self._writer.batch([_numpy(x) for x in flattened(arrays)])

    def loss(self, loss: Any) -> None:
        """Notes the loss of a batch, of the step that comes; with several batches in a step their mean is kept."""
        kept = loss.detach().clone() if isinstance(loss, Tensor) else loss
        self._writer.loss(lambda: float(kept))

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
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._flush(complete=True)
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._world = 1  # the others may never come to an all-reduce
        self.close()

    @torch.no_grad()
    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a step: values, hyperparameters, and gradients, which a closure has yet to compute."""
        self._open = before = _Before([_hyper(group, optimizer) for group in optimizer.param_groups])
        values = self._pieces(self._params)
        if self._writer.is_full:
            before.full["value"] = self._sampled(self._params)
        place = 1 if len(args) > 1 else "closure"
        closure = args[1] if place == 1 else kwargs.get("closure")
        if closure is None:
            self._gradients(optimizer, before, values)
            return None
        before.sums.append(self._sketcher.sums(values))

        def observed() -> Any:
            loss = closure()
            if before.missing is None:
                with torch.no_grad():
                    self._gradients(optimizer, before)
                if loss is not None and not self._writer.has_loss:
                    self.loss(loss)
            return loss

        if place == 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def _gradients(self, optimizer: Any, before: "_Before", *values: Sequence[Tensor | None]) -> None:
        """What the optimizer is given; with the values, which are seen at once, if they have not been."""
        grads = [p.grad for p in self._params]
        before.missing = np.array([grads[k] is None for k in self._place], bool)
        before.sums.append(self._sketcher.sums(*values, self._pieces(grads)))
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        before.scale = None if scale is None else scale.clone()  # a fused optimizer unscales by itself
        before.found_inf = None if found_inf is None else found_inf.clone()
        if before.full:
            by = 1.0 if scale is None else float(scale)
            before.full["gradient"] = {name: x / by for name, x in self._sampled(grads).items()}

    @torch.no_grad()
    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before, self._open = self._open, None
        if before is None:
            return
        if before.missing is None:  # a closure that was not called
            self._gradients(optimizer, before)
        self._kept += [*before.sums, self._sketcher.sums(self._pieces(self._params))]
        moved = self._buffers.sketches() if self._buffers else None
        if before.full:
            now = self._sampled(self._params)
            before.full["update"] = {name: now[name] - x for name, x in before.full["value"].items()}
            if self._buffers:
                before.full[STATISTICS] = self._buffers.observed(self._writer.entries)[1]
        known = sum(len(group["params"]) for group in optimizer.param_groups)
        s = _global_moment(optimizer)
        missing, scale, found_inf = before.missing, before.scale, before.found_inf
        max_norm, norm = _own_clipping(optimizer)
        assert missing is not None

        def fill(step: Step) -> None:
            value, gradient, after = next(self._fetched)
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # of a run that diverges
                value[:, 0], gradient[:, 0] = np.sqrt(value[:, 0]), np.sqrt(gradient[:, 0])
                gradient /= 1.0 if scale is None else float(scale)
            gradient[missing] = np.nan
            step.sketches = dict(zip(TENSORS, (value, gradient, change(value, after)), strict=True))
            if moved is not None:
                step.sketches[STATISTICS] = moved.cpu().numpy().astype(np.float64)
            if norm is not None:
                step.clip_gradient(max_norm, float(norm))
            step.hyper = [_finite(group) for group in before.hyper]
            step.skipped = found_inf is not None and bool(found_inf)
            extra = {"s": s, "loss_scale": scale, "untraced": known - len(self._params) or None}
            step.extra = {name: float(x) for name, x in extra.items() if x is not None}

        step = Step(0, empty_sketches(len(self._parameters)), missing, full=before.full)
        if self._outputs is not None:
            self._outputs.take(self._writer.output)
        self._writer.add(step, fill)
        if not self._writer.is_full:
            self._without_outputs()
        if self._writer.is_due:
            self._flush()

    def _without_outputs(self) -> None:
        if self._outputs is not None:
            self._outputs.remove()
            self._outputs = None

    def _pieces(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of each parameter of the trace the tensor, or the part of it, among those of the optimizer's parameters."""
        each = zip(self._parameters, self._place, strict=True)
        return [x if (x := tensors[k]) is None or p.part is None else _part(x, p.part) for p, k in each]

    def _sampled(self, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
        whole = [numpy(_whole(x)) if x is not None else None for x in tensors]
        each = [(p, whole[k]) for p, k in zip(self._parameters, self._place, strict=True)]
        return {p.name: sample(x, p, self._writer.entries) for p, x in each if x is not None}

    def _flush(self, *, complete: bool = False) -> None:
        if self._kept:  # for all steps the device is waited for once
            whole = torch.cat(self._kept).cpu().numpy().astype(np.float64)
            self._fetched = iter(whole.reshape(-1, len(TENSORS), *whole.shape[1:]))
            self._kept = []
        steps = self._writer.take()
        if self._world > 1 and steps:
            combine(steps, self._group, self._world)
        self._writer.write(steps, complete=complete)


class _Before:
    """What is known of a step before it is done."""

    def __init__(self, hyper: list[dict[str, Any]]) -> None:
        self.hyper = hyper
        self.sums: list[Tensor] = []  # of values and gradients
        self.missing: NDArray[Any] | None = None  # until gradients are seen
        self.scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.full: dict[str, dict[str, Any]] = {}


def _whole(x: Any) -> Tensor:
    return cast(Tensor, x.full_tensor() if hasattr(x, "full_tensor") else x)


def _part(x: Tensor, part: Part) -> Tensor:
    """A part of a tensor; of a sharded one, of the whole."""
    x = _whole(x.detach()).contiguous()
    if part.strides is not None:
        return x.as_strided(part.shape, part.strides, x.storage_offset() + part.offset)
    return x.reshape(-1)[torch.from_numpy(part.places).to(x.device)]


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose hooks run: wrappers, such as accelerate's, have it as `optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"Invalid optimizer: {optimizer!r} (must be a torch.optim.Optimizer)")
    return optimizer


def named(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters by the names that they have in the module itself, within torch.compile and DistributedDataParallel."""
    return named_parameters(_inner(model))


def _inner(model: Any) -> Any:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def parameters(
    own: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, names: Names, axes: Axes
) -> list[Parameter]:
    called = {id(p): name for name, p in own.items()}
    shapes: dict[str, tuple[Sequence[int], str, int]] = {}
    unknown = 0
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) in called:
                shapes[called[id(p)]] = tuple(p.shape), str(p.dtype).removeprefix("torch."), i
            else:
                unknown += 1
    if unknown:
        raise TraceError(f"The optimizer has {unknown} parameters that the model has not (give the model it is over)")
    return resolve(shapes, names, axes, own)


def _about(optimizer: torch.optim.Optimizer, world: int) -> dict[str, Any]:
    devices = {str(p.device) for group in optimizer.param_groups for p in group["params"]}
    kind = type(optimizer)
    return {
        "framework": "torch",
        "source": f"torch {torch.__version__} on {', '.join(sorted(devices))}",
        "optimizer": f"{kind.__module__.removesuffix('.' + kind.__name__.lower())}.{kind.__name__}",
        "started": bool(optimizer.state),
        "matmul": torch.get_float32_matmul_precision(),
        "processes": world,
        "threads": torch.get_num_threads(),
    }


def _hyper(group: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The numbers among a group's hyperparameters, by neutral names; of tensors copies, so that nothing waits."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        if name == "betas":
            found["b1"], found["b2"] = (_kept(b) for b in value)
        elif name == "adaptivity" and callable(value):
            counts = [optimizer.state[p]["global_step"] for p in group["params"] if "global_step" in optimizer.state[p]]
            found[name] = float(value_at(value, int(counts[0]) if counts else 0))
        elif name not in _HOW and (isinstance(value, (int, float)) or _is_scalar(value)):
            found[name] = _kept(value)
    if group.get("maximize"):
        found["maximize"] = 1.0
    return found


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _kept(value: Any) -> Any:
    """The number, or a copy of it on its device, where it may be changed in place."""
    return value.detach().clone() if isinstance(value, Tensor) else float(value)


def _finite(hyper: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: float(number(x)) for name, x in hyper.items()}
    return {name: x for name, x in numbers.items() if math.isfinite(x)}


def _own_clipping(optimizer: Any) -> tuple[float, Tensor | None]:
    """To which norm an Ada2MS clips, and the norm before; None if it does not clip."""
    norm = getattr(optimizer, "grad_norm", None)
    max_norm = choice(optimizer.param_groups[0], "max_norm") if isinstance(norm, Tensor) else None
    return (math.inf, None) if norm is None or max_norm is None else (max_norm, norm.detach().clone())


def _global_moment(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The s of an Ada2MS, if there is one for the model."""
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    if group.get("scope") != "model" or not group["params"]:
        return None
    s = optimizer.state.get(group["params"][0], {}).get("global_exp_avg_sq")
    return s.detach().clone() if isinstance(s, Tensor) else None


def _numpy(x: Any) -> Any:
    return numpy(x) if isinstance(x, Tensor) else np.asarray(x)
