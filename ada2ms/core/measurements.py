"""What an update was, for loggers and pictures: the same numbers by the same names in every framework.

Each backend has a function `measure` that returns them by these names, behind a prefix. They are computed when it is
called, from the state that the optimizer has anyway: a step that is not measured does nothing for them.

Of the whole model, without reading parameters or moments:

    updates                 k, the count of completed updates
    skipped                 steps that `nonfinite="skip"` has skipped
    lr, adaptivity          of the last update; where groups have others, those of the first, or of the optimizer
    global_second_moment    s_hat; the mean of all where there are several (scope "tensor", or groups of several b2)
    effective_step          lr / (sqrt(s_hat) + eps): the factor of m_hat where v_hat is s_hat, and everywhere at a = 0
    gradient_norm           of all gradients of the last step, before `max_norm`

Of each parameter, by a pass over it and its moments; |x| is the Euclidean norm:

    effective_steps/NAME    |lr*m_hat/d| / |m_hat|, the factor of m_hat on the whole
    update_ratios/NAME      |update| / |theta|, of the last update with its weight decay, and the value after it

What cannot be told is NaN: all but counts and hyperparameters before the first update, and a ratio of zeros. A norm
that nobody has computed is left out. The update is the rule's, before a parameter of 16 bits rounds it. It follows from
the state after it,

    update = -(lr*m_hat/d + lr*wd*theta) / (1 - lr*wd),

so that nothing is kept from before. A parameter that had no gradient in the last step has the ratio of its own last
update, by the hyperparameters of now.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

PREFIX: Final = "ada2ms/"
OF_MODEL: Final = (
    "updates",
    "skipped",
    "lr",
    "adaptivity",
    "global_second_moment",
    "effective_step",
    "gradient_norm",
)
STEPS, RATIOS = OF_PARAMETER = ("effective_steps", "update_ratios")


def matching(names: Iterable[str], match: str, argument: str = "match") -> list[str]:
    """The names in which a regular expression is found, if there are any names; `argument` is what errors call it.

    Raises:
        TypeError, ValueError: it is none, or is found in no name.
    """
    allowed = f"{argument} must be a regular expression that is found in the name of a parameter"
    message = f"Invalid {argument}: {match!r} ({allowed}"
    if not isinstance(match, str):
        raise TypeError(f"{message})")
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ValueError(f"{message}; here: {error})") from None
    names = list(names)
    found = [name for name in names if pattern.search(name)]
    if names and not found:
        raise ValueError(f"{message}, of {', '.join(map(repr, names[:8]))}{' ...' if len(names) > 8 else ''})")
    return found


def of_parameters(names: Iterable[str], steps: Iterable[Any], ratios: Iterable[Any]) -> dict[str, Any]:
    """The numbers of each parameter under their names."""
    pairs = list(zip(names, steps, ratios, strict=True))
    return {f"{STEPS}/{name}": step for name, step, _ in pairs} | {
        f"{RATIOS}/{name}": ratio for name, _, ratio in pairs
    }
