"""What moves in a module and is no parameter, such as running statistics, for traces."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ada2ms.core.state import Axes, Extras
from ada2ms.core.trace import Parameter
from ada2ms.core.trace.model import Observed, moving, observed
from ada2ms.torch.numbers import numpy
from ada2ms.torch.sketches import Sketcher


class Buffers:
    """The buffers of floating point that a module saves, in whichever tensors they are by then.

    Attributes:
        parameters: what a trace calls them.
    """

    def __init__(self, module: nn.Module, extras: Extras, axes: Axes) -> None:
        self._of: dict[str, tuple[nn.Module, str]] = {}
        for path, each in module.named_modules():
            for name, buffer in each.named_buffers(recurse=False):
                is_number = buffer.is_floating_point() or buffer.is_complex()
                if is_number and name in each.state_dict(keep_vars=True):
                    self._of[f"{path}.{name}" if path else name] = each, name
        shapes = {own: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for own, x in self._tensors().items()}
        self.parameters: Sequence[Parameter] = moving(shapes, extras, axes)
        self._sketcher = Sketcher(self._each(), self.parameters)

    def _tensors(self) -> dict[str, Tensor]:
        return {own: getattr(module, name).detach() for own, (module, name) in self._of.items()}

    def observed(self, entries: int) -> Observed:
        """Sketches and entries, at once."""
        return observed(self.parameters, {own: numpy(x) for own, x in self._tensors().items()}, entries)

    def sketches(self) -> Tensor:
        """Sketches, on the device."""
        return self._sketcher(self._each())

    def _each(self) -> list[Tensor]:
        tensors = self._tensors()
        return [tensors[p.own] if p.part is None else p.part.take(tensors[p.own], torch) for p in self.parameters]
