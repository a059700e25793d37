"""The path of a step, downwards: clip -> gate -> advance -> coefficients -> kernel. What comes before it: `reduce.py`.

All variables that share hyperparameters are a part of the step: coefficients and kernel are of one part.

The rule's equations are in `ada2ms.core.spec`, its symbols' names in the table there.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ada2ms.core.coefficients import LARGEST_SCALE, bias_correction, denom_can_be_zero, denom_scale
from ada2ms.tf.groups import Hyper, Part
from ada2ms.tf.kernels import Coefficients, Options
from ada2ms.tf.kernels import ops as on_ops
from ada2ms.tf.reduce import Sums

if TYPE_CHECKING:
    from ada2ms.tf.optimizer import Ada2MS

Tensor = Any  # of whichever backend Keras runs on
Variable = Any  # a keras.Variable, or the backend's own
Array = NDArray[Any]

_SMALLEST: Final = float(np.finfo("float32").tiny)


class Moved(NamedTuple):
    """What a step that counts makes of counts and global second moment."""

    count: Tensor  # of each variable of the optimizer; at least 1
    s_hat: Tensor  # one, or one for each variable of the optimizer


def take_step(
    optimizer: "Ada2MS", grads: Sequence[Tensor], variables: Sequence[Variable], learning_rate: Tensor, sums: Sums
) -> None:
    """Updates variables and state by dense gradients and their sums of squares."""
    indices = [optimizer._get_variable_index(v) for v in variables]
    parts = optimizer._grouping.parts(optimizer, indices)
    adaptivities = [_adaptivity(optimizer, part) for part in parts]
    clip, norm = _clip(optimizer, sums)
    step_is_live = _gate(optimizer, norm)
    if step_is_live is not None and keras.backend.backend() == "torch":  # which runs op by op: the host may know
        if not step_is_live:
            optimizer.assign_add(optimizer._skipped, 1)
            return
        step_is_live = None
    moved = _advance(optimizer, indices, _clipped(sums, clip), step_is_live)
    lr = ops.cast(learning_rate, optimizer._dtype)
    if clip is not None:
        clip = _select(step_is_live, clip, 1)
    for part, adaptivity in zip(parts, adaptivities, strict=True):
        own = [indices[i] for i in part.positions]
        each = coefficients(optimizer, part, own, lr, adaptivity, moved, clip, step_is_live)
        _update(optimizer, part, own, [grads[i] for i in part.positions], variables, each, step_is_live)


def _update(
    optimizer: "Ada2MS",
    part: Part,
    indices: list[int],
    grads: list[Tensor],
    variables: Sequence[Variable],
    coefficients: Coefficients,
    step_is_live: Tensor | None,
) -> None:
    """Calls the kernel for the variables of a part, whose indices these are."""
    variables = [variables[i] for i in part.positions]
    compensations = optimizer._compensations
    options = Options(
        decays=[bool(part.hyper.weight_decay) and i not in optimizer._excluded for i in indices],
        denom_can_be_zero=_denom_can_be_zero(part.hyper),
        compensations=[compensations[i] if compensations else None for i in indices],
        step_is_live=step_is_live,
        assign=optimizer.assign,
    )
    exp_avgs: list[Any] = [optimizer._momentums[i] for i in indices]
    exp_avg_sqs: list[Any] = [optimizer._velocities[i] for i in indices]
    # A list of tensors is updated at once, which is another thing than twice if a variable is in it twice.
    if keras.backend.backend() != "torch" or len(set(indices)) < len(indices):
        on_ops.update(variables, grads, exp_avgs, exp_avg_sqs, coefficients, options)
    else:
        from ada2ms.tf.kernels import torch as on_torch

        params, exp_avgs, exp_avg_sqs = ([v.value for v in given] for given in (variables, exp_avgs, exp_avg_sqs))
        on_torch.update(params, grads, exp_avgs, exp_avg_sqs, coefficients, options)


def _adaptivity(optimizer: "Ada2MS", part: Part) -> Tensor | float:
    """Of this step: schedules are given the count of those before it."""
    if not callable(part.hyper.adaptivity):
        return part.hyper.adaptivity
    count = of_moment(optimizer._global_step, part.moment)
    return ops.cast(part.hyper.adaptivity(ops.cast(count, optimizer._dtype)), optimizer._dtype)


def of_moment(x: Tensor, moment: int) -> Tensor:
    """What there is one of, or one for each global second moment."""
    return x[moment] if len(x.shape) else x


def _clip(optimizer: "Ada2MS", sums: Sums) -> tuple[Tensor | None, Tensor | None]:
    """The factor c of the gradients, None without `global_clipnorm`; and their norm, if it is needed."""
    max_norm = optimizer._max_norm()
    if max_norm is None and optimizer._gradient_norm is None and optimizer.nonfinite != "skip":
        return None, None
    # sqrt keeps XLA from recomputing the sum for every variable.
    norm = ops.sqrt(sums.total)
    if optimizer._gradient_norm is not None:
        optimizer.assign(optimizer._gradient_norm, norm)
    if max_norm in (None, math.inf):
        return None, norm
    quotient = max_norm / norm
    return ops.where(quotient > 1, 1.0, quotient), norm  # 1 where the norm is 0; a NaN stays one


def _clipped(sums: Sums, clip: Tensor | None) -> Sums:
    """The sums of squares of the gradients once they are multiplied by c."""
    # In this order, since c*c may be too small for a float.
    return sums if clip is None else Sums(clip * sums.each * clip, clip * sums.total * clip)


def _gate(optimizer: "Ada2MS", norm: Tensor | None) -> Tensor | None:
    """Whether the step counts; None where every step does."""
    return None if optimizer.nonfinite != "skip" else ops.isfinite(norm)


def _select(step_is_live: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """The new value; in a step that does not count, the old one."""
    return new if step_is_live is None else ops.where(step_is_live, new, old)


def _advance(optimizer: "Ada2MS", indices: list[int], sums: Sums, step_is_live: Tensor | None) -> Moved:
    """Moves the counts and the global second moment; `indices` are of the variables that have a gradient."""
    dtype, n = optimizer._dtype, len(optimizer._numel)
    has_gradient = np.zeros(n, bool)
    has_gradient[indices] = True

    k, t = ops.convert_to_tensor(optimizer._global_step), ops.convert_to_tensor(optimizer._steps)
    new_k, new_t = k + 1, t + ops.convert_to_tensor(has_gradient.astype("int32"), t.dtype)
    count = ops.cast(ops.maximum(new_t, 1), dtype)  # a variable without any update yet has nothing to correct

    s = ops.convert_to_tensor(optimizer._global_velocity)
    b2 = b2_of_moments(optimizer)
    if optimizer.scope == "model":
        numel = max(sum(optimizer._numel[i] for i in indices), 1)
        new_s = _constant(b2, dtype) * s + sums.total * _constant((1 - b2) / numel, dtype)
        s_hat = new_s / correction_of_moments(b2, ops.cast(new_k, dtype))
    else:
        shares = _shares(optimizer, indices, sums.each, b2)
        new_s = ops.where(ops.convert_to_tensor(has_gradient), _constant(b2, dtype) * s + shares, s)
        s_hat = new_s / correction_of_moments(b2, count)

    optimizer.assign(optimizer._global_velocity, _select(step_is_live, new_s, s))
    optimizer.assign(optimizer._global_step, _select(step_is_live, new_k, k))
    optimizer.assign(optimizer._steps, _select(step_is_live, new_t, t))
    if step_is_live is not None:
        optimizer.assign_add(optimizer._skipped, ops.cast(ops.logical_not(step_is_live), optimizer._skipped.dtype))
    return Moved(count, s_hat)


def b2_of_moments(optimizer: "Ada2MS") -> float | Array:
    """The b2 of the global second moment; an array, of its shape, where they differ."""
    grouping = optimizer._grouping
    b2s = [Hyper.of(optimizer, index).b2 for index in grouping.moments]
    if len(b2s) == 1:
        return b2s[0]
    if optimizer.scope == "model":
        return np.array(b2s)
    return np.array([b2s[grouping.moment_of.get(i, 0)] for i in range(len(optimizer._numel))])


def _constant(x: float | Array, dtype: str) -> Tensor | float:
    return ops.convert_to_tensor(x.astype(dtype)) if isinstance(x, np.ndarray) else x


def correction_of_moments(b2: float | Array, count: Tensor) -> Tensor:
    """1 - b2^count, of one b2 or of as many as there are counts, whose logarithms are taken in double precision."""
    if not isinstance(b2, np.ndarray):
        return bias_correction(b2, count, ops.expm1)
    with np.errstate(divide="ignore"):  # 0 has the logarithm -inf, and the correction 1
        logarithms = np.log(b2)
    dtype = keras.backend.standardize_dtype(count.dtype)
    return bias_correction(b2, count, ops.expm1, lambda _: _constant(logarithms, dtype))


def _shares(optimizer: "Ada2MS", indices: list[int], sums: Tensor, b2: float | Array) -> Tensor:
    """(1 - b2) * mean(g*g) of each variable of the optimizer; of one that is given twice, the mean of both."""
    n = len(optimizer._numel)
    weights = (1 - b2) / np.maximum(optimizer._numel, 1) / np.maximum(np.bincount(indices, minlength=n), 1)
    shares = sums * ops.convert_to_tensor(weights[indices].astype(optimizer._dtype))
    if indices == list(range(n)):
        return shares
    return ops.scatter(ops.convert_to_tensor(np.array(indices)[:, None]), shares, (n,))


def coefficients(
    optimizer: "Ada2MS",
    part: Part,
    indices: list[int],
    lr: Tensor,
    adaptivity: Tensor | float,
    moved: Moved,
    clip: Tensor | None,
    step_is_live: Tensor | None,
) -> Coefficients:
    """What the kernel needs of this step; in one that does not count, what leaves everything as it is."""
    hyper, dtype, n = part.hyper, optimizer._dtype, len(optimizer._numel)
    if hyper.lr_scale != 1:
        lr = lr * hyper.lr_scale
    s_hat = of_moment(moved.s_hat, part.moment) if optimizer.scope == "model" else moved.s_hat
    scale = denom_scale(adaptivity, s_hat, bias_correction(hyper.b2, moved.count, ops.expm1))
    # 0 if no gradient has been other than 0, or all squares were too small for a float: eps alone is the denominator.
    nothing_yet = scale == 0
    scale = ops.where(nothing_yet, ops.convert_to_tensor(float(np.finfo(dtype).tiny) ** 0.5, dtype), scale)
    step_sizes = lr / bias_correction(hyper.b1, moved.count, ops.expm1) / scale
    if _denom_can_be_zero(hyper):
        step_sizes = ops.where(nothing_yet, 0, step_sizes)

    betas: Sequence[Tensor | float] = (hyper.b1, 1 - hyper.b1, hyper.b2, 1 - hyper.b2)
    if step_is_live is not None:
        unchanged = ops.convert_to_tensor([1.0, 0.0, 1.0, 0.0], dtype)
        betas = ops.unstack(_select(step_is_live, ops.convert_to_tensor(betas, dtype), unchanged), 4)
    step_sizes = ops.unstack(_select(step_is_live, step_sizes, 0), n)
    eps = _select(step_is_live, hyper.eps / scale, 1)
    eps = ops.unstack(eps, n) if len(eps.shape) else [eps] * n  # one for all at adaptivity 0
    return Coefficients(
        betas,
        clip,
        adaptivity / 2,
        [step_sizes[i] for i in indices],
        [eps[i] for i in indices],
        _select(step_is_live, 1 - lr * hyper.weight_decay, 1),
    )


def _denom_can_be_zero(hyper: Hyper) -> bool:
    """Whether eps / denom_scale, which the kernel adds, can be 0 or be lost."""
    return denom_can_be_zero(hyper.eps / LARGEST_SCALE, _SMALLEST)
