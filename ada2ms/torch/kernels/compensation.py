"""What a 16-bit parameter and its compensation hold together: theta + compensation, in float32.

    theta        <- round(new)
    compensation <- round(new - theta)      0 where theta is not finite

Torch rounds to nearest even on every device.
"""

import torch
from torch import Tensor


def round_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Rounds to 16 bits, also within a compiled step."""
    rounded = x.to(dtype)
    if torch.compiler.is_compiling():
        # Inductor leaves out the cast to 16 bits between two of 32, and then nothing would be left of new - theta.
        # It cannot where something is done to the bits, which this leaves as they are.
        bits = rounded.view(torch.int16)
        rounded = (bits | (bits & 1)).view(dtype)
    return rounded


def write(p: Tensor, compensation: Tensor, new: Tensor, step_is_live: Tensor | None) -> None:
    """Divides a new value between a parameter and its compensation.

    Args:
        p: the parameter, of 16 bits.
        compensation: of the same dtype.
        new: in float32; is changed.
        step_is_live: whether the step counts, where the host does not know. In one that does not, neither may change,
            although their sum, rounded anew, can be divided otherwise: a compensation of half a unit is a tie.
    """
    theta = round_to(p.dtype, new)
    rest = torch.nan_to_num(new.sub_(theta), nan=0.0, posinf=0.0, neginf=0.0)
    if step_is_live is not None:
        live = step_is_live.to(p.device)
        theta, rest = torch.where(live, theta, p), torch.where(live, rest, compensation)
    p.copy_(theta)
    compensation.copy_(rest)
