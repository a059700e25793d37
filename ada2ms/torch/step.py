"""One step of the whole model, downwards: prepare, reduce, gate, coefficients, kernel.

prepare       views of what a process has of each tensor; the kernel of each group; gradients less their scale
reduce        sum(g*g), over the model or of each tensor
gate          whether the step counts: decided once, and masked once where the host does not know
coefficients  counts, s, and what is computed once for each tensor
kernel        moments and parameters
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ada2ms.core.hyperparameters import check, value_at
from ada2ms.torch.clip import clip_factor, square_sum
from ada2ms.torch.coefficients import bias_correction, coefficients
from ada2ms.torch.kernels import Options, Scalar, at, group_indices
from ada2ms.torch.kernels.choose import Kernel, choose, is_single
from ada2ms.torch.numbers import as_tensor, known_to_host, number
from ada2ms.torch.reduce import (
    all_reduced_sum,
    all_reduced_sum_over,
    are_plain,
    local,
    numel,
    squares,
    writable,
)
from ada2ms.torch.shared import choice


@dataclass
class ParamLists:
    """What a step needs of one parameter group: the tensors that have a gradient, and their state."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    compensations: list[Tensor | None]  # see `ada2ms.torch.kernels`
    steps: list[Tensor]
    global_exp_avg_sqs: list[Tensor]  # one; with scope "tensor" one per tensor
    k: Tensor
    pair: int  # groups with the same one share s and k
    leads: bool  # whether it is the first of these, which updates them
    views: tuple[list[Any], ...] = field(init=False)  # real, and what is here: params, exp_avgs, exp_avg_sqs, ...
    kernel: Kernel = field(init=False)
    plain: bool = False  # whether the views are the tensors themselves


@dataclass(frozen=True)
class Scaling:
    """What GradScaler hands to a fused step: what gradients are to be divided by; not 0 if one is not finite."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass(frozen=True)
class Division:
    """How a model is divided: among whom, and the number of all entries where padded shards do not say it."""

    group: Any = None
    whole_size: int | None = None


def step_model(
    groups: Sequence[ParamLists], averages: Sequence[Tensor], skipped: Tensor, scaling: Scaling, division: Division
) -> Tensor | None:
    """One step of the whole model, in place.

    Args:
        groups: one per parameter group.
        averages: s of all of them.
        skipped: the number of skipped steps.
        scaling: of the gradients.
        division: of the model among processes.

    Returns:
        The sum of g*g over the model, or sums that add up to it; None if there is none.
    """
    if division.group is None and not any(lists.params for lists in groups):
        return None
    inv_scale = None if scaling.grad_scale is None else scaling.grad_scale.reshape(()).double().reciprocal()
    for lists in groups:
        prepare(lists, inv_scale)
    like = averages[0] if averages else skipped  # none where another process has all parameters
    sums = sums_of_squares(groups, inv_scale, like.dtype)
    if sums.is_meta:  # shapes without values
        return None
    sums, total, size, any_gradient = reduce_sums(groups, sums, like, division)
    step_is_live = gate(groups[0].group, total, scaling.found_inf, any_gradient, skipped)
    found = square_sum(groups[0].group, total)
    if step_is_live is False:
        return found
    if isinstance(step_is_live, Tensor):
        sums, total = mask(groups, sums, step_is_live), torch.where(step_is_live, total, 0.0)
    max_norm = choice(groups[0].group, "max_norm")
    clip = (
        None if max_norm in (None, math.inf) else clip_factor(max_norm, [x.group for x in groups], total, step_is_live)
    )
    means = mean_squares(groups, sums, clip, size)
    numbers = [hyperparameters(lists, step_is_live, sums.dtype) for lists in groups]  # of all, before anything changes
    s_hats: dict[int, Scalar] = {}
    for lists, some, hyper in zip(groups, means, numbers, strict=True):
        count(lists, step_is_live)
        of_lists = global_moments(lists, some, hyper, s_hats)
        if lists.params:
            update(lists, hyper, of_lists, grad_factor(lists.kernel, inv_scale, clip), step_is_live)
    return found


def prepare(lists: ParamLists, inv_scale: Tensor | None) -> None:
    """Views of the tensors of a group, the kernel for them, and unscaled gradients for a kernel that does not scale."""
    lists.plain = not torch.compiler.is_compiling() and are_plain(lists.params)
    tensors = lists.params, lists.exp_avgs, lists.exp_avg_sqs, lists.compensations
    if lists.plain:
        lists.views = tensors
    else:
        lists.grads = [local(g, p) for g, p in zip(lists.grads, lists.params, strict=True)]
        lists.views = tuple([None if x is None else local(x) for x in some] for some in tensors)
    lists.kernel = choose(lists.views[0], lists.grads, lists.group)
    if inv_scale is not None and not lists.kernel.scales:
        lists.grads = [g.to(torch.promote_types(g.dtype, torch.float32)) * inv_scale.to(g.device) for g in lists.grads]


def sums_of_squares(groups: Sequence[ParamLists], inv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sum(g*g) of each gradient of all groups, of what is here of it."""
    found: list[Tensor] = []
    for lists in groups:
        if not lists.grads:
            continue
        x = (lists.kernel.squares or squares)(lists.grads, torch.float64 if lists.kernel.scales else dtype)
        if inv_scale is not None and lists.kernel.scales:
            x = x * inv_scale.to(x.device).square()
        found.append(x.to(found[0].device if found else x.device, dtype))
    if not found:
        return torch.zeros(0, dtype=dtype, device="cpu")
    return torch.cat(found) if len(found) > 1 else found[0]


def reduce_sums(
    groups: Sequence[ParamLists], sums: Tensor, like: Tensor, division: Division
) -> tuple[Tensor, Tensor, int | Tensor, Tensor | None]:
    """The sum over the model, or of each whole tensor; the sum over the model, or what adds up to it where no step
    needs it; the number of the model's entries; whether any has a gradient, if another process may know.
    """
    group, params = groups[0].group, [p for lists in groups for p in lists.params]
    each = group["scope"] == "tensor"
    if division.group is None:
        sums = all_reduced_sum(sums, params, each=each)
        needed = each and (group["nonfinite"] == "skip" or choice(group, "max_norm") is not None)
        return sums, sums.sum() if needed else sums, division.whole_size or max(sum(_sizes(groups)), 1), None
    total, size = all_reduced_sum_over(division.group, sums, params, like)
    return sums if each else total, total, division.whole_size or size.clamp(min=1), size > 0


def _sizes(groups: Sequence[ParamLists]) -> list[int]:
    if all(lists.plain for lists in groups):
        return [p.numel() for lists in groups for p in lists.params]
    return [numel(p) for lists in groups for p in lists.params]


def gate(
    group: dict[str, Any], total: Tensor, found_inf: Tensor | None, any_gradient: Tensor | None, skipped: Tensor
) -> bool | Tensor:
    """Whether the step counts; a 0-d tensor where the host does not know. Counts what `nonfinite="skip"` skips."""
    conditions = [] if any_gradient is None else [any_gradient]
    if found_inf is not None:
        conditions.append(found_inf.to(total.device).squeeze() == 0)
    if group["nonfinite"] == "skip":
        conditions.append(total.isfinite())
        writable(skipped).add_(conditions[-1].logical_not())
    if not conditions:
        return True
    step_is_live = reduce(and_, conditions)
    return bool(step_is_live) if known_to_host(group, total) else step_is_live


def mask(groups: Sequence[ParamLists], sums: Tensor, step_is_live: Tensor) -> Tensor:
    """Zeros for the gradients and the sums of a step that does not count; but for kernels that mask by themselves."""
    for lists in groups:
        if not lists.kernel.scales:
            lists.grads = [torch.where(step_is_live.to(g.device), g, 0.0) for g in lists.grads]
    return torch.where(step_is_live, sums, 0.0)


def grad_factor(kernel: Kernel, inv_scale: Tensor | None, clip: Scalar | None) -> Scalar:
    """What a kernel is to multiply gradients by: `clip`, and `inv_scale` if it is for the kernel to unscale them."""
    if inv_scale is None or not kernel.scales:
        return 1.0 if clip is None else clip
    return inv_scale if clip is None else inv_scale * (clip.to(inv_scale) if isinstance(clip, Tensor) else clip)


def mean_squares(
    groups: Sequence[ParamLists], sums: Tensor, clip: Scalar | None, size: int | Tensor
) -> list[list[Tensor]]:
    """For each group mean(g*g), after clipping, of the model or of each of its tensors."""
    if isinstance(clip, Tensor) or (clip is not None and clip != 1):
        sums = clip * sums * clip  # in this order, since the square of `clip` may be too small for float32
    if groups[0].group["scope"] == "model":
        mean = sums / size
        return [[mean] for _ in groups]
    sizes = [float(max(n, 1)) for n in _sizes(groups)]
    rest = iter(torch._foreach_div(sums.unbind(), sizes) if sizes else ())
    return [[next(rest) for _ in lists.params] for lists in groups]


class Hyper(NamedTuple):
    """The hyperparameters of a group in this step. Where it is masked, `lr` and the weights of its gradients are 0."""

    on_host: bool  # whether they are Python numbers, and counts may be read
    lr: Scalar
    weight_decay: Scalar
    beta1: Scalar
    beta2: Scalar
    weight1: Scalar  # 1 - beta1
    weight2: Scalar  # 1 - beta2
    adaptivity: Scalar


def hyperparameters(lists: ParamLists, step_is_live: bool | Tensor, dtype: torch.dtype) -> Hyper:
    """Those of a group, numbers where the host may know them.

    Raises:
        TypeError, ValueError: the adaptivity is a number, and none that is allowed.
    """
    group, k = lists.group, lists.k
    on_host = step_is_live is True and known_to_host(group, k)
    known = on_host and not group["differentiable"]
    lr, weight_decay, beta1, beta2 = (_scalar(x, known) for x in (group["lr"], group["weight_decay"], *group["betas"]))
    completed = int(k.item()) if on_host else k.to(dtype)
    adaptivity = _scalar(value_at(group["adaptivity"], completed), known)
    if not isinstance(adaptivity, Tensor) and not torch.compiler.is_compiling():
        check("adaptivity", adaptivity, schedule=False)
    weight1, weight2 = 1 - beta1, 1 - beta2
    if isinstance(step_is_live, Tensor):
        weight = step_is_live.to(dtype)
        lr, weight1, weight2 = lr * weight, weight1 * weight, weight2 * weight
    return Hyper(on_host, lr, weight_decay, beta1, beta2, weight1, weight2, adaptivity)


def _scalar(value: Any, known: bool) -> Any:
    """A number where the host may know it, else a 0-d tensor."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if known else value.reshape(())


def count(lists: ParamLists, step_is_live: bool | Tensor) -> None:
    """T <- t + 1 of each tensor, and k <- k + 1, in a step that counts."""
    counts = [lists.k, *lists.steps] if lists.leads else lists.steps
    if torch.compiler.is_compiling():
        for x in counts:
            writable(x).add_(step_is_live.to(x.device) if isinstance(step_is_live, Tensor) else 1)
    elif isinstance(step_is_live, Tensor):
        for indices in group_indices([(x.device, x.dtype) for x in counts]):
            some = [counts[i] for i in indices]
            torch._foreach_add_(some, step_is_live.to(some[0]), alpha=1)  # alpha selects the Tensor overload
    elif counts:
        torch._foreach_add_(counts, 1)


def global_moments(lists: ParamLists, means: Sequence[Tensor], hyper: Hyper, s_hats: dict[int, Scalar]) -> list[Scalar]:
    """S <- b2*s + (1-b2)*mean(g*g), and s_hat = s/(1-b2^k): one, or one for each tensor.

    `s_hats` has those of the pairs that a group has led in this step, since groups that share s update it once.
    """
    model = lists.group["scope"] == "model"
    if (lists.leads or not model) and lists.global_exp_avg_sqs:
        averages = [writable(s) for s in lists.global_exp_avg_sqs]
        weight2 = hyper.weight2
        torch._foreach_mul_(averages, 1 - weight2 if isinstance(weight2, Tensor) else hyper.beta2)
        some = [mean.to(s.device, s.dtype) for mean, s in zip(means, lists.global_exp_avg_sqs, strict=True)]
        torch._foreach_add_(averages, torch._foreach_mul(some, weight2))
        found = _corrected(lists, hyper)
        if not model:
            return found
        s_hats[lists.pair] = found[0]
    return [s_hats[lists.pair]] if model else []


def _corrected(lists: ParamLists, hyper: Hyper) -> list[Scalar]:
    """s_hat = s/(1-b2^k) of the group or of each tensor, numbers where the host may know them."""
    counts = lists.steps if lists.group["scope"] == "tensor" else [lists.k]
    averages = lists.global_exp_avg_sqs
    dtype, device, differentiable = averages[0].dtype, counts[0].device, lists.group["differentiable"]
    if hyper.on_host and not differentiable and all(s.is_cpu for s in averages):
        return [s.item() / bias_correction(hyper.beta2, t.item(), dtype) for s, t in zip(averages, counts, strict=True)]
    if differentiable:
        averages = [s.clone() for s in averages]  # which the next step writes to
    if hyper.on_host:
        corrections: Any = [bias_correction(hyper.beta2, t.item(), dtype) for t in counts]
    else:
        stack = as_tensor(bias_correction(hyper.beta2, torch.stack([t.to(device) for t in counts]), dtype))
        corrections = [x if x.is_cpu else x.to(s.device) for x, s in zip(stack, averages, strict=True)]
    return list(torch._foreach_div(averages, corrections))


def update(
    lists: ParamLists,
    hyper: Hyper,
    s_hats: Sequence[Scalar],
    factor: Scalar,
    step_is_live: bool | Tensor,
) -> None:
    """Coefficients and kernel for the tensors of a group, those of one device and dtype together."""
    group, kernel, (params, exp_avgs, exp_avg_sqs, compensations) = lists.group, lists.kernel, lists.views
    # The fused kernel on CPUs reads it anyway; at 0 it wants step sizes that are divided by d.
    adaptivity = number(hyper.adaptivity) if kernel.counts is not None else hyper.adaptivity
    decays = isinstance(hyper.weight_decay, Tensor) or hyper.weight_decay != 0
    options = Options(
        hyper.beta1,
        hyper.beta2,
        hyper.weight1,
        hyper.weight2,
        1 - hyper.lr * hyper.weight_decay if decays else None,
        adaptivity,
        group["maximize"],
        group["differentiable"],
        factor,
        step_is_live if isinstance(step_is_live, Tensor) else None,
    )
    counts: Sequence[Scalar] = lists.steps
    if hyper.on_host:
        counts = kernel.counts(lists.steps) if kernel.counts is not None else [t.item() for t in lists.steps]
    if is_single(kernel):
        counts = _in_turn(lists.steps, counts)
    tensors = params, lists.grads, exp_avgs, exp_avg_sqs
    together = _alike(exp_avgs, kernel)
    for indices in together:
        whole = len(together) == 1
        here = tensors if whole else tuple([x[i] for i in indices] for x in tensors)
        moment = exp_avgs[indices[0]]
        each = coefficients(
            hyper.lr,
            (hyper.beta1, hyper.beta2),
            group["eps"],
            adaptivity,
            counts if whole else [counts[i] for i in indices],
            s_hats if len(s_hats) == 1 else at(list(s_hats), indices),
            moment.device,
            torch.float64 if kernel.on_device else moment.dtype,
            fold=kernel.folds,
            gather=kernel.on_device,
        )
        some = compensations if whole or not compensations else [compensations[i] for i in indices]
        kernel.update(*here, each, options, some)


def _alike(exp_avgs: Sequence[Tensor], kernel: Kernel) -> list[list[int]]:
    """The indices of moments of one device and dtype, together."""
    if kernel.squares is not None:  # all are on the CPU
        keys: list[Any] = [x.dtype for x in exp_avgs]
    else:
        keys = [(x.device, x.dtype) for x in exp_avgs]
    if not torch.compiler.is_compiling() and len(set(keys)) == 1:
        return [list(range(len(keys)))]
    return group_indices(keys)


def _in_turn(steps: Sequence[Tensor], counts: Sequence[Scalar]) -> Sequence[Scalar]:
    """Counts after each tensor's own update: for a parameter that is listed more than once, one after the other."""
    if torch.compiler.is_compiling() or len(set(map(id, steps))) == len(steps):
        return counts
    later = Counter(map(id, steps))
    found = []
    for x, t in zip(steps, counts, strict=True):
        later[id(x)] -= 1
        found.append(t - later[id(x)])
    return found
