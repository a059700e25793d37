"""The optimizer's state in no framework's terms: how it moves from one framework to another in mid-run.

A backend's `export_state` makes a `State`, and its `import_state` takes one; `State.save` and `State.load` keep it in a
file. `model.py` says what a state is, `file.py` how it is stored, `fit.py` how it fits a framework's parameters (and
`compensation.py`, those of 16 bits), `layout.py` how arrays of the one lie in those of the other, `extras.py` what else
travels, `receipt.py` which steps led to it and `verification.py` whether they are made here as they were made,
`arguments.py` which arguments continue it, and `layers.py` what the parameters of known layers are called.
"""

from ada2ms.core.state.arguments import arguments, named_groups, plain_hyperparameters
from ada2ms.core.state.errors import StateError
from ada2ms.core.state.extras import Extra, Extras, portable_extras
from ada2ms.core.state.fit import (
    Fitted,
    Report,
    Target,
    Verification,
    from_portable,
    only_count,
    optimizer_problems,
    to_portable,
    without_moments,
)
from ada2ms.core.state.layers import (
    GATES,
    OWN,
    Layer,
    LayerNames,
    Mappings,
    Role,
    einsum_product,
    gates,
    number_layers,
)
from ada2ms.core.state.layout import Axes, Cut, Name, Names, in_state
from ada2ms.core.state.model import SLOTS, Array, Entry, Group, State
from ada2ms.core.state.receipt import Receipt, Step
from ada2ms.core.state.verification import RecordedStep, Replay, Transfer, check_verify, portable_gradients, verified

__all__ = [
    "GATES",
    "OWN",
    "SLOTS",
    "Array",
    "Axes",
    "Cut",
    "Entry",
    "Extra",
    "Extras",
    "Fitted",
    "Group",
    "Layer",
    "LayerNames",
    "Mappings",
    "Name",
    "Names",
    "Receipt",
    "RecordedStep",
    "Replay",
    "Report",
    "Role",
    "State",
    "StateError",
    "Step",
    "Target",
    "Transfer",
    "Verification",
    "arguments",
    "check_verify",
    "einsum_product",
    "from_portable",
    "gates",
    "in_state",
    "named_groups",
    "number_layers",
    "only_count",
    "optimizer_problems",
    "plain_hyperparameters",
    "portable_extras",
    "portable_gradients",
    "to_portable",
    "verified",
    "without_moments",
]

# What is pickled goes by its public name, wherever in this package it is defined.
for _public in (Entry, Group, Receipt, Report, State, StateError, Step, Verification):
    _public.__module__ = __name__
