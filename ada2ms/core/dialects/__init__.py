"""The catalogue of dialects: in what optimizers differ, and what each would have done.

`dialect.py` is what a dialect is, in words too; `catalogue.py` has the features of each family, with their values, and
the dialects of optimizers that are known; `replay.py` computes updates, under the equations of each family.
`ada2ms trace` and `ada2ms identify` both use it.
"""

from ada2ms.core.dialects.catalogue import (
    FEATURES,
    KNOWN,
    OTHERS,
    OWN,
    OWN_HYPER,
    base,
    claimed,
    is_claim,
    values_of,
    variants,
)
from ada2ms.core.dialects.dialect import DEFAULTS, FAMILIES, WORDS, Dialect, Hyper, said
from ada2ms.core.dialects.replay import Array, replay, rounded

__all__ = [
    "DEFAULTS",
    "FAMILIES",
    "FEATURES",
    "KNOWN",
    "OTHERS",
    "OWN",
    "OWN_HYPER",
    "WORDS",
    "Array",
    "Dialect",
    "Hyper",
    "base",
    "claimed",
    "is_claim",
    "replay",
    "rounded",
    "said",
    "values_of",
    "variants",
]
