"""The optimizer class: what torch.optim.AdamW has, over the rule of ada2ms.core.spec."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _use_grad_for_differentiable,
)

from ada2ms.core.hyperparameters import (
    DEFAULT_COMPENSATED,
    DEFAULT_MAX_NORM,
    DEFAULT_NONFINITE,
    DEFAULT_SCOPE,
    DEFAULTS,
    Nonfinite,
    Scope,
)
from ada2ms.core.schedules import AdaptivitySchedule
from ada2ms.torch import shared
from ada2ms.torch.checks import Given, check_fsdp, check_group, check_shard_group, whole_size
from ada2ms.torch.loading import restore, translate
from ada2ms.torch.numbers import COMPUTE_DTYPES, compensation_dtype
from ada2ms.torch.shared import CHOICES, COMPENSATION, SHARED, K, S, Tied
from ada2ms.torch.step import Division, ParamLists, Scaling, step_model
from ada2ms.torch.tying import tie

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    all; with scope "tensor" s is the parameter's own. With `compensated` there is `compensation`, too, of the shape and
    the dtype of a parameter of 16 bits. `param_groups` have hyperparameters alone.

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
        max_norm: gradients whose norm, over the whole model and before the step, is larger are scaled down to it, as by
            `torch.nn.utils.clip_grad_norm_` but for the 1e-6 that this adds to the norm; None: they are not. It takes
            no pass over the gradients, which stay as they are, and no communication: the step has their norm anyway,
            which is then in `grad_norm`. Infinity scales nothing. Groups, and state dicts, have it while it is not
            None.
        compensated: whether parameters of 16 bits keep what is lost when they are rounded, in a slot of their own dtype
            (Kahan's summation), so that updates and decay of less than half of their last digit add up: theta +
            compensation has 16 significant bits with bfloat16 and 22 with float16. Wider parameters have none. What
            writes to parameters beside the optimizer (another checkpoint loaded into the model) leaves the slot as it
            is: load the optimizer's state, too, or clear it.
        maximize, foreach, capturable, differentiable: as in torch.optim.AdamW.
        fused: as in torch.optim.AdamW, GradScaler included: one pass over the data after the sum, in C++ on CPUs and in
            Triton on CUDA. The C++ is compiled on first use (some ten seconds, once for each version and kind of
            machine) and needs a compiler and ninja; without them, a warning and the default implementation. Under
            torch.compile, whose compiler fuses it, the default implementation is what is compiled.
        shard_group: the process group among whose members the model's parameters are divided, every parameter, or every
            part of one, on a single member: ZeroRedundancyOptimizer, pipeline stages, FullyShardedDataParallel (with
            `use_orig_params=True`). The mean of g*g, and the norm, are then over all members, by one all-reduce of two
            numbers a step, which every member must take part in. (With scope "tensor" the norm alone is, for `max_norm`
            or "skip", and every parameter must be whole.) ZeroRedundancyOptimizer, which puts keywords into its state
            dict, is given `functools.partial(Ada2MS, shard_group=...)`. DistributedDataParallel needs none, and neither
            do DTensors (`fully_shard`, tensor parallelism), which know how they are divided.

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

    __module__ = "ada2ms.torch"  # in pickles, whichever file it is in

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
        max_norm: float | None = DEFAULT_MAX_NORM,
        compensated: bool = DEFAULT_COMPENSATED,
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
            "max_norm": max_norm,
            "compensated": compensated,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_shard_group(shard_group)
        if shard_group is not None and scope == "tensor" and max_norm is None and nonfinite == "propagate":
            raise ValueError("Invalid shard_group: with scope 'tensor' no number is shared (shard_group must be None)")
        self._tied: Tied | None = None
        self._given = Given()
        self._whole_size: int | None = None  # entries of the model, where the shards themselves do not say
        self._shard_group = shard_group  # not in defaults: it can neither be copied nor saved
        # What the last step leaves; torch.compile (of torch 2.13) loses attributes that a step sets, but no items.
        self._last: dict[str, Tensor | None] = {"square_sum": None}
        check_group(defaults, defaults)
        super().__init__(params, shared.plain_choices(defaults))
        if fused:
            self._step_supports_amp_scaling = True  # GradScaler then leaves the scaling to step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group joins the s and k of groups with the same b2, or takes the model's s_hat and k."""
        if isinstance(param_group, dict):  # the caller's own dict stays as it is
            param_group = {key: value for key, value in param_group.items() if key not in SHARED}
            optimizer = self.param_groups[0] if self.param_groups else self.defaults
            ours = {name: shared.choice(optimizer, name) for name in CHOICES}  # which may have been loaded, or changed
            param_group = {**ours, **param_group}
            check_group({**self.defaults, **param_group}, ours)
            param_group = shared.plain_choices(param_group)
        super().add_param_group(param_group)
        shared.leave_out_defaults(self.param_groups[-1])
        params = self.param_groups[-1]["params"]
        try:
            check_fsdp(params, self._shard_group, self.param_groups[-1]["scope"])
        except ValueError:
            self.param_groups.pop()
            raise
        self._given.add(params)

    def _init_group(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        compensations: list[Tensor | None],
        steps: list[Tensor],
        averages: list[Tensor],
        counts: list[Tensor],
        sizes: list[int],
        pairs: list[int],
    ) -> None:
        """Fills the lists with what has a gradient, of all groups, and makes the state that is not there yet.

        `compensations` are those of all parameters, None for one that has none, or empty without `compensated`;
        `averages` are s, with scope "model" of each pair of (s, k), with scope "tensor" of each parameter; `counts` the
        k of each pair, and the number of skipped steps; `sizes` the number of parameters of each group, and `pairs` the
        index of its pair. (torch.compile runs a method of this name as it is, and traces nothing in it.)
        """
        settled = False
        lists: tuple[list[Any], ...] = (params, grads, exp_avgs, exp_avg_sqs, compensations, steps, averages, sizes)
        if self._tied is not None and self._tied.moved:
            with suppress(KeyError):
                settled = self._collect(self._tied, *lists)
        if not settled:
            for some in lists:
                some.clear()
            self._whole_size = whole_size(self.param_groups, self._given, self._shard_group)
            moves = self._shard_group is not None or any(
                p.grad is not None for group in self.param_groups for p in group["params"]
            )
            self._tied = tie(self.param_groups, self.state, self._tied, moves=moves)
            if not self._collect(self._tied, *lists):
                raise ValueError("Invalid params: a parameter is in two groups (whose s must be one, and are not)")
        tied = self._tied
        assert tied is not None
        averages.extend(s for s, _ in tied.pairs if s is not None)
        counts.extend([*(k for _, k in tied.pairs), tied.skipped])
        pairs.extend(tied.of_group)

    def _collect(
        self,
        tied: Tied,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        compensations: list[Tensor | None],
        steps: list[Tensor],
        averages: list[Tensor],
        sizes: list[int],
    ) -> bool:
        """Fills the lists; false, or KeyError, as soon as something is not as it was tied."""
        if len(tied.signatures) != len(self.param_groups):
            return False
        model, states, strided, types = tied.scope == "model", self.state, torch.strided, COMPUTE_DTYPES
        for group, signature, pair in zip(self.param_groups, tied.signatures, tied.of_group, strict=True):
            if shared.signature(group) != signature:
                return False
            (s, k), before = tied.pairs[pair], len(params)
            compensated = group.get("compensated")
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
                exp_avg_sq: Tensor = state["exp_avg_sq"]
                own = state[S]
                if not exp_avg.dtype is exp_avg_sq.dtype is types[p.dtype]:
                    return False
                if own is not s and (model or not isinstance(own, Tensor)):
                    return False
                if compensated:
                    compensation = state.get(COMPENSATION)
                    if getattr(compensation, "dtype", None) is not compensation_dtype(p.dtype):
                        return False
                    compensations.append(compensation)
                params.append(p)
                grads.append(g)
                exp_avgs.append(exp_avg)
                exp_avg_sqs.append(exp_avg_sq)
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
        compensations: list[Tensor | None] = []
        steps: list[Tensor] = []
        averages: list[Tensor] = []
        counts: list[Tensor] = []
        sizes: list[int] = []
        pairs: list[int] = []
        self._init_group(params, grads, exp_avgs, exp_avg_sqs, compensations, steps, averages, counts, sizes, pairs)
        groups: list[ParamLists] = []
        start = 0
        for group, size, pair in zip(self.param_groups, sizes, pairs, strict=True):
            end = start + size
            some = averages[pair : pair + 1] if group["scope"] == "model" else averages[start:end]
            lists = ParamLists(
                group,
                params[start:end],
                grads[start:end],
                exp_avgs[start:end],
                exp_avg_sqs[start:end],
                compensations[start:end],
                steps[start:end],
                some,
                counts[pair],
                pair,
                leads=pair not in pairs[: len(groups)],
            )
            groups.append(lists)
            start = end
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        division = Division(self._shard_group, self._whole_size)
        square_sum = step_model(groups, averages, counts[-1], scaling, division)
        if square_sum is not None:
            self._last["square_sum"] = square_sum
        return loss

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients of the last step that had any, over the whole model, unscaled, before `max_norm`.

        A 0-d tensor on the device of the first of them; nothing waits for it. It is taken of what the step has computed
        anyway, with `max_norm` or without, and is infinite or NaN where a step was skipped. None before the first step,
        in copies and pickles until their first step, and where torch.compile compiles a step without `max_norm`.
        """
        square_sum = self._last["square_sum"]
        return None if square_sum is None else square_sum.sum().sqrt()

    def _health_check(self) -> None:
        name = "_accelerator_graph_capture_health_check"  # torch's check for CUDA graphs, before 2.9 under another name
        getattr(self, name, getattr(self, "_cuda_graph_capture_health_check", lambda: None))()

    def state_dict(self) -> StateDict:
        """As in torch; a schedule from `ada2ms.core` becomes plain data, and any other callable None."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            shared.leave_out_defaults(group)
            adaptivity = group.get("adaptivity")
            if callable(adaptivity):
                group["adaptivity"] = adaptivity.to_dict() if isinstance(adaptivity, AdaptivitySchedule) else None
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch, and from torch.optim.AdamW: what its state dict has not, this optimizer keeps; s is mean(v).

        The moments keep at least float32, whatever the parameters' precision. A state dict has `max_norm` and
        `compensated` only while they are on; else this optimizer keeps its own, and compensations start at zero.
        """
        handle = self.register_load_state_dict_pre_hook(translate)  # after the user's hooks
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
        self.__dict__.setdefault("_last", {"square_sum": None})
        self.__dict__.setdefault("_whole_size", None)
        self.__dict__.setdefault("_given", Given())
        restore(self.param_groups, self.state)
        for group in self.param_groups:
            if group["fused"]:
                self._step_supports_amp_scaling = True
        self._tied = None  # what was loaded may belong to someone else, too
        self._tied = tie(self.param_groups, self.state, None, moves=False)
