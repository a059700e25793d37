"""Ada2MS for Optax: `ada2ms` stands where `optax.adamw` stood, `scale_by_ada2ms` where `optax.scale_by_adam` did."""

from ada2ms._extras import require

require("jax", "jax")
require("optax", "jax")

from ada2ms.jax._layers import plain_layers
from ada2ms.jax._rule import ScaleByAda2MSState
from ada2ms.jax._state import arguments, export_state, import_state
from ada2ms.jax._transform import ada2ms, scale_by_ada2ms

__all__ = [
    "ScaleByAda2MSState",
    "ada2ms",
    "arguments",
    "export_state",
    "import_state",
    "plain_layers",
    "scale_by_ada2ms",
]
