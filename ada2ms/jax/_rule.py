"""For older pickles, which look for `ScaleByAda2MSState` here and hold its fields in another order."""

from typing import Any

from ada2ms.jax import state as states


class ScaleByAda2MSState:
    """Takes the fields in the order of those pickles, and makes a state of `ada2ms.jax`."""

    def __new__(cls, count: Any, mu: Any, nu: Any, s: Any, steps: Any, skipped: Any) -> states.ScaleByAda2MSState:  # type: ignore[misc]
        return states.ScaleByAda2MSState(count=count, mu=mu, nu=nu, s=s, skipped=skipped, steps=steps)
