"""What the last update was, for loggers; `ada2ms.core.measurements` says what the numbers are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from ada2ms.core import measurements as names
from ada2ms.core.coefficients import by_roots
from ada2ms.core.hyperparameters import value_at
from ada2ms.torch.coefficients import bias_correction, coefficients
from ada2ms.torch.groups import named_parameters
from ada2ms.torch.numbers import as_tensor, known_to_host
from ada2ms.torch.optimizer import Ada2MS
from ada2ms.torch.reduce import all_reduced_sum, local
from ada2ms.torch.shared import COMPENSATION, SKIPPED, K, S

Number = float | Tensor  # where it is a tensor, 0-d on the device of the state


@overload
def measure(
    optimizer: Any,
    model: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: Literal[True],
) -> dict[str, float]: ...


@overload
def measure(
    optimizer: Any,
    model: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: Literal[False] = False,
) -> dict[str, float | Tensor]: ...


@torch.no_grad()
def measure(
    optimizer: Any,
    model: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    match: str = "",
    prefix: str = names.PREFIX,
    wait: bool = False,
) -> Any:
    """The last update in numbers, for any logger: `ada2ms.core.measurements` has the list.

    Call it after `optimizer.step()` and before the learning rate's scheduler takes its own step. Without a model it
    reads no parameter and costs a few operations on single numbers. With one it makes a pass over each parameter and
    its moments, with memory for the largest of them: every 50th step, say. Sharded parameters (`fully_shard`, tensor
    parallelism) are measured as the whole that they are, by one small all-reduce, so that every process must call it.

    Args:
        optimizer: Ada2MS, or what wraps one as `optimizer` or `optim` (accelerate, Lightning, ZeroRedundancyOptimizer,
            whose every process measures the parameters that it updates).
        model: the module, or its parameters by name, of which those are measured that the optimizer has.
        match: a regular expression that is searched in their names (`re.search`).
        prefix: what every key begins with.
        wait: whether to wait for the device, once, and return Python numbers. If not, numbers that the host does not
            know are 0-d tensors.

    Raises:
        TypeError, ValueError: naming the argument: no Ada2MS, no parameter of it in the model, or parameters that are
            parts of tensors and do not say which (FullyShardedDataParallel).

    Example:
        >>> import torch
        >>> from ada2ms.torch import Ada2MS, measure
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = Ada2MS(model.parameters(), lr=0.5)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> measured = measure(optimizer, model, wait=True)
        >>> measured["ada2ms/lr"], [name for name in measured if name.endswith("bias")]
        (0.5, ['ada2ms/effective_steps/bias', 'ada2ms/update_ratios/bias'])
    """
    optimizer = _unwrapped(optimizer)
    found = _of_model(optimizer)
    if model is not None:
        found |= _of_parameters(optimizer, model, match)
    found = {prefix + name: x for name, x in found.items()}
    return _on_host(found) if wait else found


def _unwrapped(optimizer: Any) -> Ada2MS:
    inner = optimizer
    while inner is not None and not isinstance(inner, Ada2MS):
        inner = getattr(inner, "optimizer", getattr(inner, "optim", None))
    if inner is None:
        raise TypeError(f"Invalid optimizer: of type {type(optimizer).__name__} (must be Ada2MS, or wrap one)")
    return inner


class _Group(NamedTuple):
    """The numbers of a group in its last update."""

    lr: Any
    betas: tuple[Any, Any]
    eps: float
    weight_decay: Any
    adaptivity: Any


def _group(optimizer: Ada2MS, group: dict[str, Any]) -> tuple[_Group, Number]:
    """The numbers of a group, and its k: 0 before the first update."""
    every = (p for other in (group, *optimizer.param_groups) for p in other["params"])
    state: dict[str, Any] = next(
        (x for p in every if K in (x := optimizer.state.get(p, {}))), {K: torch.zeros((), device="cpu")}
    )
    k: Tensor = state[K]
    if known_to_host(group, k):
        count: Number = float(k)
        completed: Any = max(int(count) - 1, 0)
    else:  # a copy, since k moves on in place
        count, completed = k.clone(), (k.to(state[S].dtype if S in state else k.dtype) - 1).clamp(min=0)
    lr, decay, *betas = (_scalar(x) for x in (group["lr"], group["weight_decay"], *group["betas"]))
    adaptivity = _scalar(value_at(group["adaptivity"], completed))
    return _Group(lr, (betas[0], betas[1]), group["eps"], decay, adaptivity), count


def _scalar(value: Any) -> Any:
    """A number if the host has it; else a 0-d tensor that later steps leave alone."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if type(value) is Tensor and value.is_cpu else value.detach().reshape(()).clone()


def _of_model(optimizer: Ada2MS) -> dict[str, Any]:
    """Those numbers that need no pass over a parameter."""
    groups = [(group, *_group(optimizer, group)) for group in optimizer.param_groups]
    states = [(group, hyper, optimizer.state.get(p, {})) for group, hyper, _ in groups for p in group["params"]]
    moments = {id(state[S]): (group, hyper, state) for group, hyper, state in states if S in state and "step" in state}
    s_hats = [
        x
        for own, hyper, _ in groups
        for x in _corrected([state for group, _, state in moments.values() if group is own], own, hyper.betas[1])
    ]
    own, k = groups[0][1:]
    s_hat = _mean(s_hats)
    # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps, of an entry whose v_hat is s_hat
    d = s_hat**0.5 + own.eps
    step = math.inf if not isinstance(d, Tensor) and d == 0 else own.lr / d
    skipped = next((_scalar(state[SKIPPED]) for _, _, state in states if SKIPPED in state), 0.0)
    norm = optimizer.grad_norm
    measured = k, skipped, own.lr, own.adaptivity, s_hat, step, _scalar(norm)
    return {name: x for name, x in zip(names.OF_MODEL, measured, strict=True) if x is not None}


def _corrected(states: Sequence[dict[str, Any]], group: dict[str, Any], b2: Any) -> list[Number]:
    """S_hat of each of these states of parameters of a group; NaN before the first update."""
    if not states:
        return []
    averages: list[Tensor] = [state[S] for state in states]
    counts: list[Tensor] = [state["step" if group["scope"] == "tensor" else K] for state in states]
    dtype = averages[0].dtype
    if not known_to_host(group, counts[0]):
        stack = torch.stack([x.to(averages[0].device) for x in counts])
        s = torch.stack([x.to(averages[0]) for x in averages])
        return list(torch.where(stack > 0, s / bias_correction(b2, stack, dtype), math.nan).unbind())
    corrections = [bias_correction(b2, float(t), dtype) if t else math.nan for t in counts]
    if type(averages[0]) is Tensor and averages[0].is_cpu:
        return [float(s) / x for s, x in zip(averages, corrections, strict=True)]
    return list(torch._foreach_div(averages, corrections))


def _mean(numbers: Sequence[Number]) -> Number:
    """Of those that are no NaN."""
    tensors = [x for x in numbers if isinstance(x, Tensor)]
    if tensors:
        like = tensors[0]
        return torch.stack(
            [x.to(like) if isinstance(x, Tensor) else torch.full_like(like, x) for x in numbers]
        ).nanmean()
    known = [float(x) for x in numbers if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan


def _of_parameters(optimizer: Ada2MS, model: nn.Module | Mapping[str, Tensor], match: str) -> dict[str, Any]:
    """Those of every parameter, from sums of squares that are taken over the whole of it."""
    called: dict[Tensor, str] = {}
    for name, p in named_parameters(model).items():
        called.setdefault(p, name)
    of_group = {p: group for group in optimizer.param_groups for p in group["params"] if p in called}
    if not of_group:
        raise ValueError("Invalid model: it has no parameter of the optimizer (must be what the optimizer updates)")
    if any(getattr(p, "_fsdp_flattened", False) for p in of_group):
        raise ValueError(
            "Invalid model: its parameters are shards of FullyShardedDataParallel, which do not know of each other "
            "(must be whole, or divided by torch.distributed.fsdp.fully_shard; without a model, measure works)"
        )
    chosen = set(names.matching([called[p] for p in of_group], match))
    params = [p for p in called if p in of_group and called[p] in chosen]
    hypers = {id(group): _group(optimizer, group)[0] for group in optimizer.param_groups}
    rows = [_sums(p, optimizer.state.get(p, {}), of_group[p], hypers[id(of_group[p])]) for p in params]
    sums = all_reduced_sum(torch.stack([row.to(rows[0]) for row in rows]), params, each=True)
    step, update, theta, moment = sums.sqrt().unbind(1)
    return names.of_parameters([called[p] for p in params], (step / moment).unbind(), (update / theta).unbind())


def _sums(p: Tensor, state: dict[str, Any], group: dict[str, Any], hyper: _Group) -> Tensor:
    """The sums of squares, over what is here, of lr*m_hat/d, the update, theta and m_hat; zeros before the first."""
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    count: Number = 0.0
    if S in state and "exp_avg" in state:
        t: Tensor = state["step"]
        count = float(t) if known_to_host(group, t) else t.to(p.device)
    if not isinstance(count, Tensor) and count == 0:
        return torch.zeros(4, dtype=dtype, device=p.device)
    m, v, theta = (local(x, p) for x in (state["exp_avg"], state["exp_avg_sq"], p.detach()))
    theta = theta.to(m.dtype)
    if COMPENSATION in state:
        theta = theta + local(state[COMPENSATION], p)
    (s_hat,), a = _corrected([state], group, hyper.betas[1]), hyper.adaptivity
    step_size, scale, eps = coefficients(
        hyper.lr, hyper.betas, hyper.eps, a, [count], [s_hat], m.device, m.dtype, fold=False
    )
    step = m * step_size
    if scale is not None:
        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
        d = by_roots(v, a / 2, torch.sqrt, torch.pow) * scale + eps
        step = step / torch.where(d == 0, math.inf, d)
    decay = hyper.lr * hyper.weight_decay
    update = (step + decay * theta) / (1 - decay)
    m_hat = m / bias_correction(hyper.betas[0], count, m.dtype)
    # In double precision, since squares of small moments are nothing in float32.
    found = torch.stack([torch.linalg.vector_norm(x, dtype=dtype) for x in (step, update, theta, m_hat)]).square()
    return torch.where(count > 0, found, 0.0) if isinstance(count, Tensor) else found


def _on_host(found: dict[str, Number]) -> dict[str, float]:
    """Python numbers, by one transfer from each device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, x in found.items():
        if isinstance(x, Tensor):
            by_device.setdefault(x.device, []).append(name)
    read: dict[str, float] = {}
    for device, some in by_device.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        stack = torch.stack([as_tensor(found[name]).reshape(()).to(dtype) for name in some])
        read.update(zip(some, stack.tolist(), strict=True))
    return {name: read[name] if name in read else float(x) for name, x in found.items()}
