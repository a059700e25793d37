"""The update in keras.ops, for every backend of Keras: one variable after the other."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from ada2ms.core.coefficients import by_roots
from ada2ms.tf.dtypes import cast, compute_dtype
from ada2ms.tf.kernels import Coefficients, Options, Tensor

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
    for i, (param, g, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        dtype = compute_dtype(param.dtype)
        g, theta = ops.cast(g, dtype), ops.cast(param, dtype)
        m, v = ops.convert_to_tensor(exp_avg), ops.convert_to_tensor(exp_avg_sq)
        b1, one_minus_b1, b2, one_minus_b2 = (cast(x, dtype) for x in coefficients.betas)
        if options.step_is_live is not None:  # the weight of the gradient is 0 then, but 0 * NaN is NaN
            g = ops.where(options.step_is_live, g, 0.0)

        m = b1 * m + one_minus_b1 * g
        v = b2 * v + _weighted_square(g, one_minus_b2)
        # d = v_hat^(a/2) * s_hat^((1-a)/2) + eps
        d = denom_power(v, cast(coefficients.exponent, dtype)) + cast(coefficients.eps[i], dtype)
        if options.denom_can_be_zero:
            d = ops.where(d == 0, math.inf, d)
        if options.decays[i]:
            theta = theta * cast(coefficients.decay_factor, dtype)
        theta = theta - cast(coefficients.step_sizes[i], dtype) / d * m

        options.assign(exp_avg, m)
        options.assign(exp_avg_sq, v)
        options.assign(param, ops.cast(theta, param.dtype))


def denom_power(v: Tensor, exponent: Tensor | float) -> Tensor:
    """v^exponent for v >= 0 and exponents in [0, 0.5], where 0^0 = 1; several times faster than ops.power."""
    return by_roots(v, exponent, ops.sqrt, _power)


def _weighted_square(g: Tensor, weight: Tensor | float) -> Tensor:
    """Weight * g * g."""
    # XLA stores a product that two computations share, and g*g would be shared with the sum of squares. JAX multiplies
    # in this order therefore; on TensorFlow, XLA would regroup it on some devices only, and replicas would drift apart.
    return (weight * g) * g if keras.backend.backend() == "jax" else weight * ops.square(g)


def _power(x: Tensor, exponent: Tensor | float) -> Tensor:
    if keras.backend.backend() == "jax" and x.dtype == "float32":
        from ada2ms.tf.kernels.power import power

        return power(x, ops.cast(exponent, "float32"))
    logarithm = ops.log(x)
    if not isinstance(exponent, float):
        logarithm = ops.maximum(logarithm, -1e30)  # finite, since exponent 0 times -inf is NaN, and 0^0 is 1
    return ops.exp(exponent * logarithm)
