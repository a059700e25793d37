"""The models in torch."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ada2ms.core import State
from ada2ms.torch import Ada2MS, arguments, export_state, import_state, param_groups, plain_layers
from models.data import LETTERS, NAMES, TIME

Array = Any


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
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
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
        return self.head(self.norm(x)[:, 0])


class GPT(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.positions = nn.Embedding(TIME, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(LETTERS), bias=False)
        self.head.weight = self.letters.weight

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        time = letters.shape[1]
        x = self.letters(letters) + self.positions(torch.arange(time))
        mask = torch.ones(time, time, dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class LSTM(nn.Module):
    """Reads an image row by row. Its second bias, which other frameworks do not have, stays zero."""

    def __init__(self, units: int = 16) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, units, batch_first=True)
        self.lstm.bias_hh_l0.requires_grad_(False).zero_()
        self.head = nn.Linear(units, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(images[..., 0])
        return self.head(x[:, -1])


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut_norm(self.shortcut(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([Residual(8, 8, 1), Residual(8, 16, 2)])
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(images.permute(0, 3, 1, 2))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


MODELS = {"vit": ViT, "gpt": GPT, "lstm": LSTM, "resnet": ResNet}


class Trainer:
    """A model and its optimizer: that which continues a state, or a new one with these groups."""

    def __init__(self, kind: str, dtype: str, state: State | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = MODELS[kind]().to(getattr(torch, dtype))
        self.mappings = plain_layers(self.model, names=NAMES[kind])
        options = options if state is None else arguments(state, self.mappings["names"])
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups = param_groups(trained, options.pop("groups", []), options["lr"])
        self.optimizer = Ada2MS(groups, **options)

    def step(self, x: Array, y: Array) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        logits = self.model(torch.tensor(x))
        functional.cross_entropy(logits.flatten(0, -2), torch.tensor(y).long().flatten()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x: Array) -> Array:
        """The logits."""
        return self.model.eval()(torch.tensor(x)).numpy()

    def export_state(self) -> State:
        return export_state(self.model, self.optimizer, **self.mappings)

    def import_state(self, state: State) -> Any:
        return import_state(self.model, self.optimizer, state, **self.mappings)
