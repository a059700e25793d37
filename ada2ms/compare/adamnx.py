"""AdamNX, one of the optimizers compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT


class AdamNX(Optimizer):
    r"""Adam whose second moment freezes as training goes on (Zhu, Xiao, Min 2025, arXiv 2511.13465).

        c1     = (b1 - b1^t) / (1 - b1^t)                             m <- c1*m + (1-c1)*g       (t counts from 1)
        c2     = (1 - b2^((1-b2)*(t-1))) / (1 - b2^((1-b2)*t))        v <- c2*v + (1-c2)*g*g
        theta <- theta*(1 - lr*wd) - lr*m/(sqrt(v) + eps)

    Bias correction is folded into c1: m is Adam's m_hat. The defaults are the paper's. For real, dense parameters.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: b1 and b2, in (0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay, scaled by lr.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                t, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
                c1 = (b1 - b1**t) / (1 - b1**t)
                c2 = (1 - b2 ** ((1 - b2) * (t - 1))) / (1 - b2 ** ((1 - b2) * t))
                m.lerp_(p.grad, 1 - c1)
                v.mul_(c2).addcmul_(p.grad, p.grad, value=1 - c2)
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-lr)
        return loss
