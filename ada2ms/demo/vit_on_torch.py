"""The Vision Transformer in PyTorch."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ada2ms.core import State
from ada2ms.core.state import Mappings, Report
from ada2ms.demo.digits import Array
from ada2ms.torch import Ada2MS, arguments, export_state, import_state, param_groups, plain_layers


class Block(nn.Module):
    """A transformer's, which normalises before attention and before two dense layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        out: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Logits, (batch, 10), of images, (batch, 8, 8, 1)."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images.permute(0, 3, 1, 2)).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x)[:, 0])
        return logits


class ModelTrainer:
    """A model that maps arrays to logits, trained on the cross-entropy; `options` are those of Ada2MS."""

    def __init__(self, model: nn.Module, mappings: Mappings, **options: Any) -> None:
        self.model, self.mappings = model, mappings
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = param_groups(trained, options.pop("groups", []), options["lr"])
        self.optimizer = Ada2MS(groups, **options)

    def step(self, x: Array, y: Array) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        logits = self.model(torch.tensor(x))
        loss = functional.cross_entropy(logits.flatten(0, -2), torch.tensor(y).long().flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x: Array) -> Array:
        """The logits."""
        logits: Array = self.model.eval()(torch.tensor(x)).numpy()
        return logits

    def export_state(self) -> State:
        return export_state(self.model, self.optimizer, **self.mappings)

    def import_state(self, state: State) -> Report:
        return import_state(self.model, self.optimizer, state, **self.mappings)


def trainer(state: State) -> ModelTrainer:
    """Of a ViT, in float32, with the optimizer that `state` has been exported from; not yet with its values."""
    model = ViT()
    mappings = plain_layers(model, names="auto")
    return ModelTrainer(model, mappings, **arguments(state, mappings["names"]))
