"""The optimizer class: what torch.optim.AdamW has, over the rule of ada2ms.core.spec."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _device_dtype_check_for_fused,
    _use_grad_for_differentiable,
)

from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS, Nonfinite, Scope, check
from ada2ms.core.schedules import AdaptivitySchedule, from_dict
from ada2ms.torch.reduction import entries, local, whole
from ada2ms.torch.step import Batch, ada2ms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHARED = ("global_exp_avg_sq", "global_step", "skipped")  # the state in each param_group: s, k, skipped steps
_LATER = {  # what a state dict of an earlier version may lack
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "adaptivity": DEFAULTS.adaptivity,
    "scope": DEFAULT_SCOPE,
    "nonfinite": DEFAULT_NONFINITE,
}


class Ada2MS(Optimizer):
    r"""A drop-in for torch.optim.AdamW whose denominator moves between AdamW's and momentum SGD's.

    .. math::
        d = \hat v^{a/2} \, \hat s^{(1-a)/2} + \epsilon, \qquad
        \theta \leftarrow \theta \, (1 - \mathit{lr} \, \lambda) - \mathit{lr} \, \hat m / d

    with AdamW's averages m and v, and s the average of the mean of g*g over the whole model. The rule, its source (the
    abstract of arXiv 2605.20533, in this project's reading) and the table of names are in `ada2ms.core.spec`.

    State: per tensor `exp_avg`, `exp_avg_sq` (of the parameter's shape, in at least float32), `step`, and with scope
    "tensor" `global_exp_avg_sq`; per parameter group `global_exp_avg_sq`, `global_step` and `skipped`, 0-d tensors in
    `param_groups`, where every way of saving a state dict finds them.

    Differs from AdamW: 16-bit parameters have float32 state, also after loading; a state dict holds a schedule from
    `ada2ms.core` as plain data and leaves out any other callable, in whose place the optimizer that loads keeps its
    own; loading a state dict of AdamW sets s to the mean of v.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the first moment and of both second moments, in [0, 1).
        eps: added to the denominator, after bias correction and outside the root.
        weight_decay: decoupled weight decay, scaled by lr.
        adaptivity: 1 is AdamW, 0 is momentum SGD normalised by one number; a number in [0, 1], a tensor of one element,
            a schedule from `ada2ms.core`, or any callable of the count of completed updates. The count is a Python
            number, and a 0-d tensor with `capturable` or under torch.compile.
        scope: "model": one global second moment for the whole model, across groups; "tensor": one per tensor.
        nonfinite: "propagate", or "skip" a step in which a gradient is not finite: it changes nothing but `skipped`.
        maximize, foreach, capturable, differentiable: as in torch.optim.AdamW.
        fused: as in torch.optim.AdamW, GradScaler included: one pass over the data after the sum, in C++ on CPUs and in
            Triton on CUDA. The C++ is compiled on first use (some ten seconds, once for each version and kind of
            machine) and needs a compiler and ninja; without them, a warning and the default implementation. Under
            torch.compile, whose compiler fuses it, the default implementation is what is compiled.
        shard_group: the process group among whose members the model's parameters are divided, every parameter, or every
            part of one, on a single member: ZeroRedundancyOptimizer, pipeline stages, FullyShardedDataParallel (with
            `use_orig_params=True`). The mean of g*g is then over all members, by one all-reduce of two numbers a step,
            which every member must take part in. DistributedDataParallel needs none, and neither do DTensors
            (`fully_shard`, tensor parallelism), which know how they are divided.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.

    Example:
        >>> import torch
        >>> from ada2ms.torch import Ada2MS
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = Ada2MS(model.parameters(), lr=1e-3, adaptivity=0.5)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = DEFAULTS.lr,  # type: ignore[assignment]  # a number
        betas: tuple[float | Tensor, float | Tensor] = (DEFAULTS.b1, DEFAULTS.b2),
        eps: float = DEFAULTS.eps,
        weight_decay: float = DEFAULTS.weight_decay,
        *,
        adaptivity: float | Tensor | Callable[[Any], Any] = DEFAULTS.adaptivity,
        scope: Scope = DEFAULT_SCOPE,
        nonfinite: Nonfinite = DEFAULT_NONFINITE,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        shard_group: "ProcessGroup | None" = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adaptivity": adaptivity,
            "scope": scope,
            "nonfinite": nonfinite,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        if shard_group is not None and scope == "tensor":
            raise ValueError("Invalid shard_group: with scope 'tensor' no number is shared (shard_group must be None)")
        self._shard_group = shard_group  # not in defaults: it can neither be copied nor saved
        _check_group(defaults, defaults)
        super().__init__(params, defaults)
        if fused:
            self._step_supports_amp_scaling = True  # GradScaler then leaves the scaling to step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group joins the average of an existing group with the same b2, or starts one of its own."""
        if isinstance(param_group, dict):
            _check_group({**self.defaults, **param_group}, self.defaults)
        super().add_param_group(param_group)
        group, others = self.param_groups[-1], self.param_groups[:-1]
        if self._shard_group is None and any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
            self.param_groups.pop()
            raise ValueError(
                "Invalid shard_group: None (the parameters are shards of FullyShardedDataParallel, which do not know "
                "of each other: shard_group must be its process group; or use torch.distributed.fsdp.fully_shard)"
            )
        like = next((other for other in others if _number(other["betas"][1]) == _number(group["betas"][1])), None)
        for key in _SHARED:
            if key not in group:
                shared = others[0] if key == "skipped" and others else like
                group[key] = torch.zeros((), dtype=_count_dtype()) if shared is None else shared[key].clone()
        self._settle()

    def _settle(self) -> None:
        """Gives s of every group its precision and, with the counts, its device."""
        params = [p for group in self.param_groups for p in group["params"]]
        double = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        for group in self.param_groups:
            s = group["global_exp_avg_sq"]
            group["global_exp_avg_sq"] = s.to(torch.float64 if double else torch.float32)
            self._place(group)

    def _place(self, group: dict[str, Any]) -> None:
        """Moves s beside the parameters, which may have moved, and the counts to where they belong."""
        if group["params"] and not group["params"][0].is_meta:
            device = group["params"][0].device
            for key in _SHARED:
                home = device if key == "global_exp_avg_sq" or _counts_on_device(group, device) else torch.device("cpu")
                if group[key].device != home:
                    group[key] = group[key].to(home)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        global_exp_avg_sqs: list[Tensor],
        counts: list[Tensor],
    ) -> None:
        """Fills the lists, and makes the state that is not there yet. (torch.compile calls it as Python.)"""
        self._place(group)
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError("Ada2MS does not support sparse gradients")
            state = self.state[p]
            if len(state) == 0:
                if group["fused"] and p.is_meta:
                    _device_dtype_check_for_fused(p)  # raises
                on_device = _counts_on_device(group, p.device)
                dtype = _count_dtype(group["fused"])
                state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
                state["exp_avg"] = torch.zeros_like(p, dtype=wide(p.dtype), memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide(p.dtype), memory_format=torch.preserve_format)
                if group["scope"] == "tensor":
                    dtype = group["global_exp_avg_sq"].dtype
                    state["global_exp_avg_sq"] = torch.zeros((), dtype=dtype, device=p.device)
            params.append(p)
            grads.append(p.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])
            if group["scope"] == "tensor":
                global_exp_avg_sqs.append(state["global_exp_avg_sq"])
        if group["scope"] == "model":
            global_exp_avg_sqs.append(group["global_exp_avg_sq"])
        counts.extend([group["global_step"], group["skipped"]])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable  # type: ignore[misc]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.
        """
        self._health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        batches = []
        for group in self.param_groups:
            batch = Batch(group)
            self._init_group(
                group,
                batch.params,
                batch.grads,
                batch.exp_avgs,
                batch.exp_avg_sqs,
                batch.steps,
                batch.global_exp_avg_sqs,
                batch.counts,
            )
            batches.append(batch)
        ada2ms(batches, getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self._shard_group)
        return loss

    def _health_check(self) -> None:
        name = "_accelerator_graph_capture_health_check"  # torch's check for CUDA graphs, before 2.9 under another name
        getattr(self, name, getattr(self, "_cuda_graph_capture_health_check", lambda: None))()

    def state_dict(self) -> StateDict:
        """As in torch; a schedule from `ada2ms.core` becomes plain data, and any other callable None."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            adaptivity = group.get("adaptivity")
            if callable(adaptivity):
                group["adaptivity"] = adaptivity.to_dict() if isinstance(adaptivity, AdaptivitySchedule) else None
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch, and from torch.optim.AdamW: what its state dict has not, this optimizer keeps; s is mean(v).

        The moments keep at least float32, whatever the parameters' precision.
        """
        handle = self.register_load_state_dict_pre_hook(_translate)  # after the user's hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        if self._shard_group is not None:
            raise TypeError("an Ada2MS with a shard_group can be neither copied nor pickled; its state_dict can")
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_shard_group", None)
        for group in self.param_groups:
            for key, value in _LATER.items():
                group.setdefault(key, value)
            for key in _SHARED:
                group[key] = torch.as_tensor(group.get(key, 0.0), dtype=None if key in group else _count_dtype())
            for p in group["params"]:
                for key, value in self.state.get(p, {}).items():
                    if isinstance(value, _Kept):
                        dtype = wide(p.dtype) if key.startswith("exp_avg") else value.tensor.dtype
                        self.state[p][key] = value.tensor.to(p.device, dtype)
                    elif key == "step":
                        device = p.device if _counts_on_device(group, p.device) else "cpu"
                        self.state[p][key] = torch.as_tensor(value, dtype=_count_dtype(group["fused"]), device=device)
            if group["fused"]:
                self._step_supports_amp_scaling = True
        self._settle()


@dataclass(frozen=True)
class _Kept:
    """A tensor that torch's load_state_dict passes on as it is, in place of casting it to the parameter's dtype."""

    tensor: Tensor


def _translate(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """A state dict of Ada2MS, of an earlier version of it or of AdamW, as `Ada2MS.__setstate__` takes it."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    if len(groups) != len(optimizer.param_groups):
        return state_dict  # torch raises
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for key in own.keys() - group.keys() - {"params", "param_names", *_SHARED}:
            group[key] = own[key]
        if group["adaptivity"] is None:
            group["adaptivity"] = own["adaptivity"]
        elif isinstance(group["adaptivity"], dict):
            group["adaptivity"] = from_dict(group["adaptivity"])
    state = {pid: dict(values) for pid, values in state_dict["state"].items() if isinstance(values, dict)}
    _warm_start(groups, state)
    for values in state.values():
        values.update({key: _Kept(x) for key, x in values.items() if isinstance(x, Tensor) and key != "step"})
    return {**state_dict, "state": {**state_dict["state"], **state}, "param_groups": groups}


def _warm_start(groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> None:
    """Where a state dict has v but no s, as AdamW's: s = mean(v), of as many steps as any tensor has had."""
    started = [values for values in state.values() if "exp_avg_sq" in values]
    if not started:
        return
    v = [values["exp_avg_sq"] for values in started]
    if groups[0]["scope"] == "tensor":
        for values, x in zip(started, v, strict=True):
            values.setdefault("global_exp_avg_sq", _mean([x]))
    for group in groups:
        if "global_exp_avg_sq" not in group:
            group["global_exp_avg_sq"] = _mean(v)
            group["global_step"] = torch.tensor(max(float(values["step"]) for values in started))


def _mean(tensors: list[Tensor]) -> Tensor:
    dtype = max((wide(local(x).dtype) for x in tensors), key=lambda dtype: dtype.itemsize)
    sums = torch.stack([local(x).sum(dtype=dtype).to(tensors[0].device) for x in tensors])
    return whole(sums, tensors, each=False) / max(sum(map(entries, tensors)), 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: b2 = 0.999 does not move an average in 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def _count_dtype(fused: bool | None = False) -> torch.dtype:
    """As torch's own `step`."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32


def _counts_on_device(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the counts live beside the parameters, so that nothing waits for them; else on the CPU, as in torch."""
    return bool(group["capturable"] or group["fused"]) or (group["nonfinite"] == "skip" and device.type != "cpu")


def _number(value: Any) -> Any:
    return value.detach().item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _check_group(options: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Raises unless the hyperparameters of a group are allowed; in the words of torch.optim.AdamW if it has any."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    lr, betas, foreach_only = options["lr"], options["betas"], options["foreach"] and not options["capturable"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (betas must be a pair of numbers in [0, 1))")
    for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, Tensor):
            if foreach_only:
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for field, argument, value in (
        ("lr", "lr", lr),
        ("eps", "eps", options["eps"]),
        ("b1", "betas[0]", betas[0]),
        ("b2", "betas[1]", betas[1]),
        ("weight_decay", "weight_decay", options["weight_decay"]),
        ("adaptivity", "adaptivity", options["adaptivity"]),
        ("scope", "scope", options["scope"]),
        ("nonfinite", "nonfinite", options["nonfinite"]),
    ):
        check(field, _number(value), argument, schedule=None if field == "adaptivity" else False)
    for name in ("scope", "nonfinite"):
        if options[name] != optimizer[name]:
            raise ValueError(f"Invalid {name}: {options[name]!r} (must be the optimizer's, {optimizer[name]!r})")
