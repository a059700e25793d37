"""The update of the variables and their moments: `ops.py` for every backend of Keras, `torch.py` for torch alone.

Both have the same `update(params, grads, exp_avgs, exp_avg_sqs, coefficients, options)`, whose lists have an entry for
each variable that has a gradient in this step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Tensor = Any  # of whichever backend Keras runs on


class Coefficients(NamedTuple):
    """What a step computes once; lists have an entry for each variable of the step.

    `denom_scale` is divided out of the denominator, d = denom_scale * (v^(a/2) + eps/denom_scale), which saves a kernel
    an operation for each entry. In a step that does not count they leave everything as it is.
    """

    betas: Sequence[Tensor | float]  # b1, 1 - b1, b2, 1 - b2
    clip: Tensor | None  # c, which gradients are multiplied by; None where they are not clipped
    exponent: Tensor | float  # a/2, of v
    step_sizes: list[Tensor]  # lr / (1 - b1^t) / denom_scale
    eps: list[Tensor]  # eps / denom_scale
    decay_factor: Tensor  # 1 - lr * weight_decay


class Options(NamedTuple):
    """What is known before a step begins.

    Attributes:
        decays: whether each variable decays.
        denom_can_be_zero: whether d can be 0, where the update must be 0.
        compensations: what the rounding of each variable has lost so far; None for variables that do not keep that.
        step_is_live: whether the step counts, if the host cannot know that; else None.
        assign: how a variable is given a value.
    """

    decays: Sequence[bool]
    compensations: Sequence[Any | None]
    denom_can_be_zero: bool
    step_is_live: Tensor | None
    assign: Callable[[Any, Tensor], None]
