"""What tests of the torch backend share."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ada2ms.torch import Ada2MS


def shared_numbers(optimizer: Ada2MS, group: int = 0) -> dict[str, Any]:
    """The state of one of a group's parameters, which has the numbers that all of them share."""
    return next(optimizer.state[p] for p in optimizer.param_groups[group]["params"] if optimizer.state.get(p))


class Operations(TorchDispatchMode):
    """The names of torch's operations but views; each is at least one launch on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))
