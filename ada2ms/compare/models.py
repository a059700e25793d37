"""Small networks of the usual kinds. Images are (batch, channels, height, width), texts (batch, length) of integers."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResNet(nn.Module):
    """ResNet-20 for small images (He et al. 2016): three stages of three blocks of two 3x3 convolutions."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Sequential(_conv(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            *(
                _ResidualBlock(widths[stage] if i == 0 else widths[stage + 1], widths[stage + 1], stage > 0 and i == 0)
                for stage in range(3)
                for i in range(3)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        stride = 2 if halve else 1
        self.residual = nn.Sequential(
            _conv(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            _conv(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return functional.relu(shortcut + self.residual(x))


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ConvNeXt(nn.Module):
    """A small ConvNeXt (Liu et al. 2022): 2x2 patches, two stages of two blocks with 5x5 depthwise convolutions."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 2, 2),
            *(_ConvNeXtBlock(width) for _ in range(2)),
            nn.Conv2d(width, 2 * width, 2, 2),
            *(_ConvNeXtBlock(2 * width) for _ in range(2)),
        )
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(x).mean((2, 3))))
        return logits


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.pointwise = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.depthwise(x).permute(0, 2, 3, 1))
        return x + y.permute(0, 3, 1, 2)


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al. 2021): patches of a quarter of the side, three layers, mean over positions."""

    def __init__(self, channels: int, classes: int, width: int, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, side // 4, side // 4)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = _transformer(width, 3)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.patches(x).flatten(2).mT + self.positions).mean(1))
        return logits


class TextTransformer(nn.Module):
    """A causal transformer of two layers over characters; the logits of the next one at every place."""

    def __init__(self, characters: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = _transformer(width, 2)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        logits: Tensor = self.head(self.layers(self.tokens(x) + self.positions, mask=mask, is_causal=True))
        return logits


def _transformer(width: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, width // 16, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
    for weights in encoder.parameters():  # nn.TransformerEncoder starts all its layers as copies of one
        if weights.ndim > 1:
            nn.init.xavier_uniform_(weights)
    return encoder
