"""Ada2MS: one rule, three frameworks, one trajectory.

    from ada2ms.torch import Ada2MS       torch.optim.Optimizer
    from ada2ms.tf import Ada2MS          keras.optimizers.Optimizer, on every Keras backend; or from ada2ms.keras
    from ada2ms.jax import ada2ms         optax.GradientTransformation
    from ada2ms.core import Ada2MS        NumPy: the specification
    import ada2ms.timm                    the name "ada2ms" in timm's registry of optimizers

Importing this package loads no framework.
"""

import importlib
from types import ModuleType

__version__ = "0.2.0"
__all__ = ["__version__", "core", "jax", "keras", "tf", "torch"]

_BACKENDS = ("core", "jax", "keras", "tf", "torch")


def __getattr__(name: str) -> ModuleType:
    if name in _BACKENDS:
        return importlib.import_module(f"ada2ms.{name}")
    raise AttributeError(f"module 'ada2ms' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_BACKENDS])
