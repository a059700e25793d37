"""The models in torch."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ada2ms.core import State
from ada2ms.demo.vit_on_torch import Block, ModelTrainer, ViT
from ada2ms.torch import arguments, plain_layers
from models.data import LETTERS, NAMES, TIME


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


class Trainer(ModelTrainer):
    """With the optimizer that continues a state, or a new one with these groups."""

    def __init__(self, kind: str, dtype: str, state: State | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        model = MODELS[kind]().to(getattr(torch, dtype))
        mappings = plain_layers(model, names=NAMES[kind])
        super().__init__(model, mappings, **(options if state is None else arguments(state, mappings["names"])))
