"""The optimizer class: what torch.optim.AdamW has, over the rule of ada2ms.core.spec."""

from collections import ChainMap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _use_grad_for_differentiable,
)

from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS, Nonfinite, Scope, check
from ada2ms.core.schedules import AdaptivitySchedule, from_dict
from ada2ms.torch import shared
from ada2ms.torch.reduction import entries
from ada2ms.torch.shared import SHARED, K, S, Tied, wide
from ada2ms.torch.step import Batch, ada2ms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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

    State, in `state[p]` of each parameter that has had an update: `step`, `exp_avg` and `exp_avg_sq` (of the
    parameter's shape, in at least float32), `global_exp_avg_sq` (s), `global_step` (k) and `skipped`. The last three
    are one tensor for all parameters that share them: s and k for those whose groups have the same b2, `skipped` for
    all; with scope "tensor" s is the parameter's own. `param_groups` have hyperparameters alone.

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
        self._tied: Tied | None = None
        self._given: list[dict[int, int]] = []  # for each group as given, its parameters' sizes by their id
        self._whole_size: int | None = None  # entries of the model, where the shards themselves do not say
        self._shard_group = shard_group  # not in defaults: it can neither be copied nor saved
        _check_group(defaults, defaults)
        super().__init__(params, defaults)
        if fused:
            self._step_supports_amp_scaling = True  # GradScaler then leaves the scaling to step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group joins the s and k of groups with the same b2, or takes the model's s_hat and k."""
        if isinstance(param_group, dict):  # the caller's own dict stays as it is
            param_group = {key: value for key, value in param_group.items() if key not in SHARED}
            _check_group({**self.defaults, **param_group}, self.defaults)
        super().add_param_group(param_group)
        try:
            self._check_shards(self.param_groups[-1:])
        except ValueError:
            self.param_groups.pop()
            raise
        self._given.append({id(p): entries(p) for p in self.param_groups[-1]["params"]})
        self._tied = None

    def _check_shards(self, groups: Sequence[dict[str, Any]]) -> int | None:
        """Raises where parameters are shards that do not know of each other, and nobody else does.

        Returns:
            The number of entries of the whole model, if the groups' tensors are flat shards of it, which may be padded.
        """
        params = [p for group in groups for p in group["params"]]
        if self._shard_group is None and any(getattr(p, "_fsdp_flattened", False) for p in params):
            raise ValueError(
                "Invalid shard_group: None (the parameters are shards of FullyShardedDataParallel, which do not know "
                "of each other: shard_group must be its process group; or use torch.distributed.fsdp.fully_shard)"
            )
        given: dict[int, int] = dict(ChainMap(*self._given))
        flat = params and all(type(p) is Tensor and p.ndim == 1 and id(p) not in given for p in params)
        if not (flat and given and dist.is_available() and dist.is_initialized()):
            return None
        if self._shard_group is None and dist.get_world_size() > 1:
            raise ValueError(
                "Invalid shard_group: None (the parameters were replaced by flat shards, as by DeepSpeed's ZeRO, which "
                "do not know of each other: shard_group must be their process group; or use "
                "torch.distributed.fsdp.fully_shard)"
            )
        if len(self._given) > 1:
            raise ValueError(
                f"Invalid params: {len(self._given)} groups (flat shards of DeepSpeed's ZeRO are updated one group "
                "after the other, without the others' gradients: there must be one group; or use "
                "torch.distributed.fsdp.fully_shard)"
            )
        return sum(given.values())

    def _init_group(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        averages: list[Tensor],
        counts: list[Tensor],
        sizes: list[int],
        pairs: list[int],
    ) -> None:
        """Fills the lists with what has a gradient, of all groups, and makes the state that is not there yet.

        `averages` are s, with scope "model" of each pair of (s, k), with scope "tensor" of each parameter; `counts` the
        k of each pair, and the number of skipped steps; `sizes` the number of parameters of each group, and `pairs` the
        index of its pair. (torch.compile runs a method of this name as it is, and traces nothing in it.)
        """
        settled = False
        lists: tuple[list[Any], ...] = (params, grads, exp_avgs, exp_avg_sqs, steps, averages, sizes)
        with suppress(KeyError):
            settled = self._collect(*lists)
        if not settled:
            for some in lists:
                some.clear()
            self._whole_size = self._check_shards(self.param_groups)
            moves = self._shard_group is not None or any(
                p.grad is not None for group in self.param_groups for p in group["params"]
            )
            self._tied = shared.tie(self.param_groups, self.state, self._tied, moves=moves)
            self._collect(*lists)
        tied = self._tied
        assert tied is not None
        averages.extend(s for s, _ in tied.pairs if s is not None)
        counts.extend([*(k for _, k in tied.pairs), tied.skipped])
        pairs.extend(tied.of_group)

    def _collect(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        averages: list[Tensor],
        sizes: list[int],
    ) -> bool:
        """Fills the lists; false, or KeyError, as soon as something is not as it was tied."""
        tied = self._tied
        if tied is None or len(tied.signatures) != len(self.param_groups):
            return False
        model, states, strided, types = tied.scope == "model", self.state, torch.strided, shared.WIDE
        for group, signature, pair in zip(self.param_groups, tied.signatures, tied.of_group, strict=True):
            if shared.signature(group) != signature:
                return False
            (s, k), before = tied.pairs[pair], len(params)
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if g.layout is not strided:
                    raise RuntimeError("Ada2MS does not support sparse gradients")
                state = states[p]
                if state[K] is not k:
                    return False
                exp_avg: Tensor = state["exp_avg"]
                own: Any = state[S]
                if exp_avg.dtype is not types[p.dtype] or (own is not s and (model or not isinstance(own, Tensor))):
                    return False
                params.append(p)
                grads.append(g)
                exp_avgs.append(exp_avg)
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])
                if not model:
                    averages.append(state[S])
            sizes.append(len(params) - before)
        return True

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

        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        averages: list[Tensor] = []
        counts: list[Tensor] = []
        sizes: list[int] = []
        pairs: list[int] = []
        self._init_group(params, grads, exp_avgs, exp_avg_sqs, steps, averages, counts, sizes, pairs)
        batches: list[Batch] = []
        start = 0
        for group, size, pair in zip(self.param_groups, sizes, pairs, strict=True):
            end = start + size
            some = averages[pair : pair + 1] if group["scope"] == "model" else averages[start:end]
            batch = Batch(
                group,
                params[start:end],
                grads[start:end],
                exp_avgs[start:end],
                exp_avg_sqs[start:end],
                steps[start:end],
                some,
                counts[pair],
                pair,
                leads=pair not in pairs[: len(batches)],
            )
            batches.append(batch)
            start = end
        ada2ms(
            batches,
            averages,
            counts[-1],
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self._shard_group,
            self._whole_size,
        )
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
        self.__dict__.setdefault("_whole_size", None)
        self.__dict__.setdefault("_given", [])
        for group in self.param_groups:
            for key, value in _LATER.items():
                group.setdefault(key, value)
            _from_group(group, self.state)
            for p in group["params"]:
                for key, value in self.state.get(p, {}).items():
                    if isinstance(value, _Kept):
                        dtype = wide(p.dtype) if key in ("exp_avg", "exp_avg_sq") else value.tensor.dtype
                        self.state[p][key] = value.tensor.to(p.device, dtype)
                    elif key == "step":
                        device = p.device if shared.counts_on_device(group, p.device) else "cpu"
                        self.state[p][key] = shared.count(value, shared.count_dtype(group["fused"]), device)
            if group["fused"]:
                self._step_supports_amp_scaling = True
        self._tied = None  # what was loaded may belong to someone else, too
        self._tied = shared.tie(self.param_groups, self.state, None, moves=False)


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
        for key in own.keys() - group.keys() - {"params", "param_names"}:
            group[key] = own[key]
        if group["adaptivity"] is None:
            group["adaptivity"] = own["adaptivity"]
        elif isinstance(group["adaptivity"], dict):
            group["adaptivity"] = from_dict(group["adaptivity"])
    state = dict(state_dict["state"])
    for pid in (pid for group in groups for pid in group["params"]):
        if isinstance(state.get(pid), dict):
            state[pid] = {k: _Kept(x) if isinstance(x, Tensor) and k != "step" else x for k, x in state[pid].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def _from_group(group: dict[str, Any], state: Any) -> None:
    """Moves s, k and the skipped steps from a group, where an earlier version had them, to the group's parameters."""
    found = {key: group.pop(key) for key in SHARED if key in group}
    if K not in found:
        return
    started = [p for p in group["params"] if "exp_avg" in state.get(p, ())]
    if not started and group["params"] and float(found[K]) > 0:
        started = [min(group["params"], key=lambda p: p.numel())]  # which gets the rest of its state when it is tied
    for p in started:
        values = state[p]
        if K in values:
            continue
        if S in values or group["scope"] == "tensor":  # the group's s is nobody's
            values.update({key: x for key, x in found.items() if key != S})
        else:
            values.update(found)


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
        check(field, shared.number(value), argument, schedule=None if field == "adaptivity" else False)
    for name in ("scope", "nonfinite"):
        if options[name] != optimizer[name]:
            raise ValueError(f"Invalid {name}: {options[name]!r} (must be the optimizer's, {optimizer[name]!r})")
