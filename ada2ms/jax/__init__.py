"""Ada2MS for Optax: `ada2ms` stands where `optax.adamw` stood, `scale_by_ada2ms` where `optax.scale_by_adam` did."""

from ada2ms._extras import require

require("jax", "jax")
require("optax", "jax")

from ada2ms.jax.layers import plain_layers
from ada2ms.jax.measurements import measure
from ada2ms.jax.optimizer import ada2ms, scale_by_ada2ms
from ada2ms.jax.receipt import export_gradients
from ada2ms.jax.recorded import recorded
from ada2ms.jax.state import CompensatedAda2MSState, ScaleByAda2MSState
from ada2ms.jax.trace import Recorder
from ada2ms.jax.transfer import arguments, export_state, import_state

__all__ = [
    "CompensatedAda2MSState",
    "Recorder",
    "ScaleByAda2MSState",
    "ada2ms",
    "arguments",
    "export_gradients",
    "export_state",
    "import_state",
    "measure",
    "plain_layers",
    "recorded",
    "scale_by_ada2ms",
]

for _state in (CompensatedAda2MSState, ScaleByAda2MSState):
    _state.__module__ = __name__  # in pickles, which outlive files of this package
