"""The path of a step, downwards: gate -> advance -> coefficients -> kernel. What comes before it: `reduce.py`.

The rule's equations are in `ada2ms.core.spec`, its symbols' names in the table there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import keras
import numpy as np
from keras import ops

from ada2ms.core.coefficients import LARGEST_SCALE, bias_correction, denom_can_be_zero, denom_scale
from ada2ms.core.hyperparameters import value_at
from ada2ms.tf.kernels import Coefficients, Options
from ada2ms.tf.kernels import ops as on_ops
from ada2ms.tf.reduce import Sums

if TYPE_CHECKING:
    from ada2ms.tf.optimizer import Ada2MS

Tensor = Any  # of whichever backend Keras runs on
Variable = Any  # a keras.Variable, or the backend's own

_SMALLEST: Final = float(np.finfo("float32").tiny)


class Moved(NamedTuple):
    """What a step that counts makes of counts and global second moment."""

    count: Tensor  # of each variable of the optimizer; at least 1
    s_hat: Tensor  # one, or one for each variable of the optimizer


def take_step(
    optimizer: "Ada2MS", grads: Sequence[Tensor], variables: Sequence[Variable], learning_rate: Tensor, sums: Sums
) -> None:
    """Updates variables and state by dense gradients and their sums of squares."""
    adaptivity = _adaptivity(optimizer)
    step_is_live = _gate(optimizer, sums)
    if step_is_live is not None and keras.backend.backend() == "torch":  # which runs op by op: the host may know
        if not step_is_live:
            optimizer.assign_add(optimizer._skipped, 1)
            return
        step_is_live = None
    indices = [optimizer._get_variable_index(v) for v in variables]
    moved = _advance(optimizer, indices, sums, step_is_live)
    lr = ops.cast(learning_rate, optimizer._dtype)
    coefficients = _coefficients(optimizer, indices, lr, adaptivity, moved, step_is_live)
    options = Options(
        decays=[bool(optimizer.weight_decay) and i not in optimizer._excluded for i in indices],
        denom_can_be_zero=_denom_can_be_zero(optimizer),
        step_is_live=step_is_live,
        assign=optimizer.assign,
    )
    moments = [optimizer._momentums[i] for i in indices], [optimizer._velocities[i] for i in indices]
    # A list of tensors is updated at once, which is another thing than twice if a variable is in it twice.
    if keras.backend.backend() != "torch" or len(set(indices)) < len(indices):
        on_ops.update(variables, grads, *moments, coefficients, options)
    else:
        from ada2ms.tf.kernels import torch as on_torch

        tensors = ([v.value for v in given] for given in (variables, *moments))
        params, exp_avgs, exp_avg_sqs = tensors
        on_torch.update(params, grads, exp_avgs, exp_avg_sqs, coefficients, options)


def _adaptivity(optimizer: "Ada2MS") -> Tensor | float:
    """Of this step: schedules are given the count of those before it."""
    adaptivity = value_at(optimizer.adaptivity, ops.cast(optimizer._global_step, optimizer._dtype))
    return adaptivity if isinstance(adaptivity, float) else ops.cast(adaptivity, optimizer._dtype)


def _gate(optimizer: "Ada2MS", sums: Sums) -> Tensor | None:
    """Whether the step counts; None where every step does."""
    if optimizer.nonfinite != "skip":
        return None
    # sqrt keeps XLA from recomputing the sum for every variable.
    return ops.isfinite(ops.sqrt(sums.total))


def _select(step_is_live: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """The new value; in a step that does not count, the old one."""
    return new if step_is_live is None else ops.where(step_is_live, new, old)


def _advance(optimizer: "Ada2MS", indices: list[int], sums: Sums, step_is_live: Tensor | None) -> Moved:
    """Moves the counts and the global second moment; `indices` are of the variables that have a gradient."""
    dtype, b2, n = optimizer._dtype, optimizer.beta_2, len(optimizer._numel)
    has_gradient = np.zeros(n, bool)
    has_gradient[indices] = True

    k, t = ops.convert_to_tensor(optimizer._global_step), ops.convert_to_tensor(optimizer._steps)
    new_k, new_t = k + 1, t + ops.convert_to_tensor(has_gradient.astype("int32"), t.dtype)
    count = ops.cast(ops.maximum(new_t, 1), dtype)  # a variable without any update yet has nothing to correct

    s = ops.convert_to_tensor(optimizer._global_velocity)
    if optimizer.scope == "model":
        numel = max(sum(optimizer._numel[i] for i in indices), 1)
        new_s = b2 * s + sums.total * ((1 - b2) / numel)
        s_hat = new_s / bias_correction(b2, ops.cast(new_k, dtype), ops.expm1)
    else:
        shares = _shares(optimizer, indices, sums.each)
        new_s = ops.where(ops.convert_to_tensor(has_gradient), b2 * s + shares, s)
        s_hat = new_s / bias_correction(b2, count, ops.expm1)

    optimizer.assign(optimizer._global_velocity, _select(step_is_live, new_s, s))
    optimizer.assign(optimizer._global_step, _select(step_is_live, new_k, k))
    optimizer.assign(optimizer._steps, _select(step_is_live, new_t, t))
    if step_is_live is not None:
        optimizer.assign_add(optimizer._skipped, ops.cast(ops.logical_not(step_is_live), optimizer._skipped.dtype))
    return Moved(count, s_hat)


def _shares(optimizer: "Ada2MS", indices: list[int], sums: Tensor) -> Tensor:
    """(1 - b2) * mean(g*g) of each variable of the optimizer; of one that is given twice, the mean of both."""
    n = len(optimizer._numel)
    weights = (
        (1 - optimizer.beta_2) / np.maximum(optimizer._numel, 1) / np.maximum(np.bincount(indices, minlength=n), 1)
    )
    shares = sums * ops.convert_to_tensor(weights[indices].astype(optimizer._dtype))
    if indices == list(range(n)):
        return shares
    return ops.scatter(ops.convert_to_tensor(np.array(indices)[:, None]), shares, (n,))


def _coefficients(
    optimizer: "Ada2MS",
    indices: list[int],
    lr: Tensor,
    adaptivity: Tensor | float,
    moved: Moved,
    step_is_live: Tensor | None,
) -> Coefficients:
    """What the kernel needs of this step; in one that does not count, what leaves everything as it is."""
    dtype, b1, b2, n = optimizer._dtype, optimizer.beta_1, optimizer.beta_2, len(optimizer._numel)
    scale = denom_scale(adaptivity, moved.s_hat, bias_correction(b2, moved.count, ops.expm1))
    # 0 if no gradient has been other than 0, or all squares were too small for a float: eps alone is the denominator.
    nothing_yet = scale == 0
    scale = ops.where(nothing_yet, ops.convert_to_tensor(float(np.finfo(dtype).tiny) ** 0.5, dtype), scale)
    step_sizes = lr / bias_correction(b1, moved.count, ops.expm1) / scale
    if _denom_can_be_zero(optimizer):
        step_sizes = ops.where(nothing_yet, 0, step_sizes)

    betas: Sequence[Tensor | float] = (b1, 1 - b1, b2, 1 - b2)
    if step_is_live is not None:
        unchanged = ops.convert_to_tensor([1.0, 0.0, 1.0, 0.0], dtype)
        betas = ops.unstack(_select(step_is_live, ops.convert_to_tensor(betas, dtype), unchanged), 4)
    step_sizes = ops.unstack(_select(step_is_live, step_sizes, 0), n)
    eps = _select(step_is_live, optimizer.epsilon / scale, 1)
    eps = ops.unstack(eps, n) if len(eps.shape) else [eps] * n  # one for all at adaptivity 0
    return Coefficients(
        betas,
        adaptivity / 2,
        [step_sizes[i] for i in indices],
        [eps[i] for i in indices],
        _select(step_is_live, 1 - lr * optimizer.weight_decay, 1),
    )


def _denom_can_be_zero(optimizer: "Ada2MS") -> bool:
    """Whether eps / denom_scale, which the kernel adds, can be 0 or be lost."""
    return denom_can_be_zero(optimizer.epsilon / LARGEST_SCALE, _SMALLEST)
