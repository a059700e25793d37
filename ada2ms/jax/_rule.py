"""Where pickles that were made before `ada2ms.jax.ScaleByAda2MSState` had its fields in order look for it."""

from typing import Any

from ada2ms.jax import step


class ScaleByAda2MSState:
    """Takes the fields as those pickles have them, by their places, and makes the state of today."""

    def __new__(cls, count: Any, mu: Any, nu: Any, s: Any, steps: Any, skipped: Any) -> step.ScaleByAda2MSState:  # type: ignore[misc]
        return step.ScaleByAda2MSState(count=count, mu=mu, nu=nu, s=s, skipped=skipped, steps=steps)
