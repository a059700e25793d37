"""The update in keras.ops, for every backend of Keras: one variable after the other."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from ada2ms.core.coefficients import by_roots
from ada2ms.tf.dtypes import cast, compute_dtype
from ada2ms.tf.kernels import Coefficients, Options, Tensor
from ada2ms.tf.kernels.rounding import rounded

Variable = Any  # a keras.Variable, or the backend's own


def update(
    params: Sequence[Variable],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Variable],
    exp_avg_sqs: Sequence[Variable],
    coefficients: Coefficients,
    options: Options,
) -> None:
    """Assigns variables and moments their new values."""
    b1, weight, b2, weight_of_square = coefficients.betas
    root = None  # of the weight of c*c*g*g, where gradients are clipped
    if coefficients.clip is not None:
        weight, root = weight * coefficients.clip, _sqrt(weight_of_square) * coefficients.clip
    for i, (param, g, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        dtype = compute_dtype(param.dtype)
        g, theta = ops.cast(g, dtype), ops.cast(param, dtype)
        m, v = ops.convert_to_tensor(exp_avg), ops.convert_to_tensor(exp_avg_sq)
        if options.step_is_live is not None:  # the weight of the gradient is 0 then, but 0 * NaN is NaN
            g = ops.where(options.step_is_live, g, 0.0)

        m = cast(b1, dtype) * m + cast(weight, dtype) * g
        if root is None:
            v = cast(b2, dtype) * v + _weighted_square(g, cast(weight_of_square, dtype))
        else:  # a square of a product, since the product of squares may be too small for a float
            v = cast(b2, dtype) * v + ops.square(cast(root, dtype) * g)
        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
        d = denom_power(v, cast(coefficients.exponent, dtype)) + cast(coefficients.eps[i], dtype)
        if options.denom_can_be_zero:
            d = ops.where(d == 0, math.inf, d)
        compensation = options.compensations[i]
        if compensation is not None:
            theta = theta + ops.cast(compensation, dtype)
        if options.decays[i]:
            theta = theta * cast(coefficients.decay_factor, dtype)
        theta = theta - cast(coefficients.step_sizes[i], dtype) / d * m

        options.assign(exp_avg, m)
        options.assign(exp_avg_sq, v)
        if compensation is None:
            options.assign(param, ops.cast(theta, param.dtype))
        else:
            _assign_compensated(param, compensation, theta, options)


def _assign_compensated(param: Variable, compensation: Variable, new: Tensor, options: Options) -> None:
    """Rounds the new values to the variable's type, and keeps what that loses; 0 where a variable is not finite."""
    theta = rounded(new, param.dtype)
    lost = ops.where(ops.isfinite(theta), new - theta, 0.0)
    for variable, value in ((param, theta), (compensation, lost)):
        value = ops.cast(value, variable.dtype)
        if options.step_is_live is not None:  # rounding the sum again could pass a unit from one to the other
            value = ops.where(options.step_is_live, value, ops.convert_to_tensor(variable))
        options.assign(variable, value)


def denom_power(v: Tensor, exponent: Tensor | float) -> Tensor:
    """v^exponent for v >= 0 and exponents in [0, 0.5], where 0^0 = 1; several times faster than ops.power."""
    return by_roots(v, exponent, ops.sqrt, _power)


def _weighted_square(g: Tensor, weight: Tensor | float) -> Tensor:
    """Weight * g * g."""
    # XLA stores a product that two computations share, and g*g would be shared with the sum of squares. JAX multiplies
    # in this order therefore; on TensorFlow, XLA would regroup it on some devices only, and replicas would drift apart.
    return (weight * g) * g if keras.backend.backend() == "jax" else weight * ops.square(g)


def _sqrt(x: Tensor | float) -> Tensor | float:
    return math.sqrt(x) if isinstance(x, float) else ops.sqrt(x)


def _power(x: Tensor, exponent: Tensor | float) -> Tensor:
    if keras.backend.backend() == "jax" and x.dtype == "float32":
        from ada2ms.tf.kernels.power import power

        return power(x, ops.cast(exponent, "float32"))
    if keras.backend.backend() == "torch":  # on which ops.maximum makes float32 of float64
        return x**exponent
    logarithm = ops.log(x)
    if not isinstance(exponent, float):
        logarithm = ops.maximum(logarithm, -1e30)  # finite, since exponent 0 times -inf is NaN, and 0^0 is 1
    return ops.exp(exponent * logarithm)
