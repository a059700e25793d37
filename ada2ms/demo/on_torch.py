"""The network in PyTorch."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ada2ms.core import State
from ada2ms.demo.digits import Array
from ada2ms.torch import export_state, import_state, plain_layers


class Network(nn.Module):
    """Convolutions, then dense layers, of the given weights."""

    def __init__(self, weights: list[Array]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
            layer: nn.Conv2d | nn.Linear
            if kernel.ndim == 4:
                layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, padding="same")
            else:
                layer = nn.Linear(kernel.shape[0], kernel.shape[1])
            layer.weight = nn.Parameter(torch.tensor(_to_torch(kernel)))
            layer.bias = nn.Parameter(torch.tensor(bias))
            self.layers.append(layer)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.permute(0, 3, 1, 2)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                x = functional.avg_pool2d(functional.silu(layer(x)), 2)
            else:
                if x.ndim == 4:  # flattened in the order of (height, width, channels), as elsewhere
                    x = x.permute(0, 2, 3, 1).flatten(1)
                x = layer(x)
                if layer is not self.layers[-1]:
                    x = functional.silu(x)
        return x


class TorchTrainer:
    """A `Trainer`; `optimizer` makes the optimizer from the network's parameters."""

    def __init__(
        self,
        weights: list[Array],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.network = Network(weights).to(device)
        self.optimizer = optimizer(self.network.parameters())

    def step(self, images: Array, labels: Array) -> tuple[float, list[Array]]:
        self.optimizer.zero_grad()
        logits = self.network(torch.tensor(images, device=self.device))
        loss = functional.cross_entropy(logits, torch.tensor(labels, device=self.device).long())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item(), [_from_torch(p.grad) for p in self.network.parameters()]

    def parameters(self) -> list[Array]:
        return [_from_torch(p.detach()) for p in self.network.parameters()]

    @torch.no_grad()
    def predict(self, images: Array) -> Array:
        logits: torch.Tensor = self.network(torch.tensor(images, device=self.device))
        return logits.argmax(-1).cpu().numpy()

    def export_state(self) -> State:
        return export_state(self.network, self.optimizer, **plain_layers(self.network))

    def import_state(self, state: State) -> None:
        import_state(self.network, self.optimizer, state, **plain_layers(self.network))


def _to_torch(kernel: Array) -> Array:
    """(height, width, in, out) -> (out, in, height, width); (in, out) -> (out, in)."""
    return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T)


def _from_torch(tensor: Any) -> Array:
    array: Array = tensor.cpu().numpy()
    return {4: lambda: array.transpose(2, 3, 1, 0), 2: lambda: array.T}.get(array.ndim, lambda: array)().copy()
