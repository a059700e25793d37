"""One step of the whole model: the mean of g*g, then s and the update of each parameter group."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from ada2ms.core.hyperparameters import check, value_at
from ada2ms.torch import fused
from ada2ms.torch.functional import Options, Scalar, _multi_tensor_ada2ms, _single_tensor_ada2ms, correction, together
from ada2ms.torch.fused import _fused_ada2ms
from ada2ms.torch.reduction import among, are_plain, entries, local, squares, whole, writable


@dataclass
class Batch:
    """What a step needs of one parameter group: the tensors that have a gradient, and their state."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    global_exp_avg_sqs: list[Tensor]  # one; with scope "tensor" one per tensor
    k: Tensor
    pair: int  # groups with the same one share s and k
    leads: bool  # whether it is the first of these, which updates them
    adaptivity: Scalar = 0.0  # in this step
    plain: bool = False  # whether all are whole, and real
    fused: bool = False  # whether this step is by the fused kernel


def ada2ms(
    batches: Sequence[Batch],
    averages: Sequence[Tensor],
    skipped: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    shard_group: Any = None,
    whole_size: int | None = None,
) -> None:
    """One step of the whole model, in place.

    Args:
        batches: one per parameter group.
        averages: s of all of them.
        skipped: the number of skipped steps.
        grad_scale: a scalar that the gradients are to be divided by.
        found_inf: a scalar; unless it is 0, the step is skipped.
        shard_group: the process group whose members hold the other parameters of the model.
        whole_size: the number of their entries, if shards are padded.
    """
    params = [p for batch in batches for p in batch.params]
    if not params and shard_group is None:
        return
    if grad_scale is not None:
        grad_scale = grad_scale.reshape(())
    for batch in batches:
        batch.plain = not torch.compiler.is_compiling() and are_plain(batch.params)
        if not batch.plain:
            batch.grads = [local(g, p) for g, p in zip(batch.grads, batch.params, strict=True)]
        batch.fused = bool(batch.group["fused"]) and not torch.compiler.is_compiling() and fused.supports(batch.grads)
        if grad_scale is not None and not batch.fused:
            batch.grads = [
                g.to(torch.promote_types(g.dtype, torch.float32)) / grad_scale.to(g.device) for g in batch.grads
            ]
    group = batches[0].group
    each, dtype = group["scope"] == "tensor", averages[0].dtype
    squared = _squares(batches, grad_scale, dtype)
    if squared.is_meta:  # shapes without values
        return
    sizes = [p.numel() for p in params] if all(batch.plain for batch in batches) else [entries(p) for p in params]
    live: Tensor | None = None
    size: int | Tensor = whole_size or max(sum(sizes), 1)
    if shard_group is None:
        sums = whole(squared, params, each=each)
    else:
        sums, size = among(shard_group, squared, params, averages[0])
        live = size > 0  # else no member has a gradient, and nothing happens
        size = whole_size or size.clamp(min=1)

    on_host = _on_host(group, sums)
    if found_inf is not None:
        good = found_inf.to(sums.device).squeeze() == 0
        live = good if live is None else live & good
    if group["nonfinite"] == "skip":
        finite = sums.sum().isfinite()
        writable(skipped).add_(finite.logical_not())
        live = finite if live is None else live & finite
    if live is not None and on_host:
        if not live.item():
            return
        live = None
    if live is not None:
        sums = torch.where(live, sums, 0.0)

    for batch in batches:  # of all, before anything changes
        batch.adaptivity = _adaptivity(batch, live, dtype)
    if not each:
        mean = sums / size
        s_hats: dict[int, Scalar] = {}
        for batch in batches:
            _update(batch, [mean], live, grad_scale, s_hats)
        return
    means = torch._foreach_div(sums.unbind(), [float(max(n, 1)) for n in sizes]) if sizes else ()
    start = 0
    for batch in batches:
        end = start + len(batch.params)
        _update(batch, means[start:end], live, grad_scale, {})
        start = end


def _squares(batches: Sequence[Batch], grad_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sum(g*g) of each gradient of all groups."""
    found: list[Tensor] = []
    for batch in batches:
        if batch.grads:
            x = fused.squares(batch.grads, grad_scale) if batch.fused else squares(batch.grads, dtype)
            found.append(x.to(found[0].device if found else x.device, dtype))
    return torch.cat(found) if found else torch.zeros(0, dtype=dtype)


def _on_host(group: dict[str, Any], tensor: Tensor) -> bool:
    """Whether Python may read this scalar without waiting for a device; torch's FakeTensor it may not."""
    return tensor.is_cpu and type(tensor) is Tensor and not group["capturable"] and not torch.compiler.is_compiling()


def _scalar(value: Any, on_host: bool) -> Any:
    """A number where the host may know it, else a 0-d tensor."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if on_host else value.reshape(())


def _corrected(batch: Batch, beta2: Scalar, on_host: bool) -> list[Scalar]:
    """s_hat = s/(1-b2^k) of the group or of each tensor, numbers where the host may know them."""
    counts = batch.steps if batch.group["scope"] == "tensor" else [batch.k]
    averages = batch.global_exp_avg_sqs
    dtype, device, differentiable = averages[0].dtype, counts[0].device, batch.group["differentiable"]
    if on_host and not differentiable and all(s.is_cpu for s in averages):
        return [s.item() / correction(beta2, t.item(), dtype) for s, t in zip(averages, counts, strict=True)]
    if differentiable:
        averages = [s.clone() for s in averages]  # which the next step writes to
    if on_host:
        corrections: Any = [correction(beta2, count.item(), dtype) for count in counts]
    else:
        stack = torch.as_tensor(correction(beta2, torch.stack([count.to(device) for count in counts]), dtype))
        corrections = [x if x.is_cpu else x.to(s.device) for x, s in zip(stack, averages, strict=True)]
    return list(torch._foreach_div(averages, corrections))


def _adaptivity(batch: Batch, live: Tensor | None, dtype: torch.dtype) -> Scalar:
    """The adaptivity of a group in this step; raises where it is a number and is none that is allowed."""
    group, k = batch.group, batch.k
    on_host = live is None and _on_host(group, k)
    count = int(k.item()) if on_host else k.to(dtype)
    adaptivity: Scalar = _scalar(value_at(group["adaptivity"], count), on_host and not group["differentiable"])
    if not isinstance(adaptivity, Tensor) and not torch.compiler.is_compiling():
        check("adaptivity", adaptivity, schedule=False)
    return adaptivity


def _update(
    batch: Batch,
    means: Sequence[Tensor],
    live: Tensor | None,
    grad_scale: Tensor | None,
    s_hats_of_pairs: dict[int, Scalar],
) -> None:
    """One step of a group, given mean(g*g) of the model or of each tensor, and whether to update at all."""
    group, k, dtype = batch.group, batch.k, means[0].dtype if means else torch.float32
    on_host = live is None and _on_host(group, k)
    differentiable = group["differentiable"]
    numbers = (group["lr"], group["weight_decay"], *group["betas"])
    lr, weight_decay, beta1, beta2 = [_scalar(x, on_host and not differentiable) for x in numbers]
    counts = [k, *batch.steps] if batch.leads else batch.steps
    if not counts:
        return
    if torch.compiler.is_compiling():
        for count in counts:
            writable(count).add_(1 if live is None else live.to(count.device))
    elif live is None:
        torch._foreach_add_(counts, 1)
    else:
        for indices in together(counts, lambda count: (count.device, count.dtype)):
            some = [counts[i] for i in indices]
            torch._foreach_add_(some, live.to(some[0]), alpha=1)  # with alpha, a tensor is not taken for a number
    weight2 = 1 - beta2
    if live is not None:  # a step that is skipped: no learning rate, and no weight to this gradient
        lr, weight2 = lr * live.to(dtype), weight2 * live.to(dtype)

    # s <- b2*s + (1-b2)*mean(g*g),   s_hat = s/(1-b2^k)
    s_hats: list[Scalar] = []
    model = group["scope"] == "model"
    if batch.global_exp_avg_sqs and (batch.leads or not model):
        averages = [writable(s) for s in batch.global_exp_avg_sqs]
        torch._foreach_mul_(averages, 1 - weight2 if isinstance(weight2, Tensor) else beta2)
        means = [mean.to(s.device, s.dtype) for mean, s in zip(means, batch.global_exp_avg_sqs, strict=True)]
        torch._foreach_add_(averages, torch._foreach_mul(means, weight2))
        s_hats = _corrected(batch, beta2, on_host)
    if model:
        if batch.leads:
            s_hats_of_pairs[batch.pair] = s_hats[0]
        s_hats = [s_hats_of_pairs[batch.pair]] * len(batch.params)

    if not batch.params:
        return
    options = Options(
        lr,
        beta1,
        beta2,
        group["eps"],
        weight_decay,
        batch.adaptivity,
        group["maximize"],
        differentiable,
        live,
        grad_scale if batch.fused else None,
    )
    tensors = [batch.params, batch.exp_avgs, batch.exp_avg_sqs]
    params, exp_avgs, exp_avg_sqs = tensors if batch.plain else [[local(x) for x in xs] for xs in tensors]
    if batch.fused:
        _fused_ada2ms(params, batch.grads, exp_avgs, exp_avg_sqs, batch.steps, s_hats, options)
        return
    foreach = group["foreach"]
    if foreach is None:
        foreach = _default_to_fused_or_foreach(params, differentiable, use_fused=False)[1]
    steps: list[Any] = [t.item() for t in batch.steps] if on_host else batch.steps
    (_multi_tensor_ada2ms if foreach else _single_tensor_ada2ms)(
        params,
        batch.grads,
        exp_avgs,
        exp_avg_sqs,
        steps if foreach else _in_turn(batch.steps, steps),
        s_hats,
        options,
    )


def _in_turn(counts: list[Tensor], steps: list[Any]) -> list[Any]:
    """Counts after each tensor's own update: for a parameter that is listed more than once, one after the other."""
    if torch.compiler.is_compiling() or len(set(map(id, counts))) == len(counts):
        return steps
    later = Counter(map(id, counts))
    found = []
    for x, t in zip(counts, steps, strict=True):
        later[id(x)] -= 1
        found.append(t - later[id(x)])
    return found
