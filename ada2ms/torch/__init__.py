"""Ada2MS for PyTorch: `Ada2MS`, a `torch.optim.Optimizer`."""

from ada2ms._extras import require

require("torch", "torch")

import torch

from ada2ms.core.schedules import KINDS
from ada2ms.torch.groups import param_groups
from ada2ms.torch.layers import plain_layers
from ada2ms.torch.measurements import measure
from ada2ms.torch.optimizer import Ada2MS
from ada2ms.torch.receipt import export_gradients
from ada2ms.torch.trace import Recorder
from ada2ms.torch.transfer import arguments, export_state, import_state

# Who saves live parameter groups (Lightning's BaseFinetuning, torch's ZeroRedundancyOptimizer) saves schedules.
torch.serialization.add_safe_globals(list(KINDS.values()))

__all__ = [
    "Ada2MS",
    "Recorder",
    "arguments",
    "export_gradients",
    "export_state",
    "import_state",
    "measure",
    "param_groups",
    "plain_layers",
]
