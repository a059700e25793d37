"""Ada2MS for PyTorch: `Ada2MS`, a `torch.optim.Optimizer`."""

from ada2ms._extras import require

require("torch", "torch")

from ada2ms.torch.optimizer import Ada2MS

__all__ = ["Ada2MS"]
