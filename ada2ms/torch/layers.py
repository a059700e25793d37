"""Ready mappings of plain layers."""

from collections.abc import Mapping

from torch import nn

from ada2ms.core.state import Axes, Layer, Mappings, number_layers

_NORMS = tuple(
    getattr(nn, name)
    for name in ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
)


def plain_layers(model: nn.Module, *, names: Mapping[str, str] | None = None, axes: Axes = None) -> Mappings:
    """`names` and `axes` for a model of plain layers, which the same model in another framework maps to the same state.

    Layers are numbered in the order in which modules are registered: `0.conv.kernel`, `0.conv.bias`, `1.norm.scale`,
    `2.dense.kernel`, `3.embedding.table`. Kernels are (height, width, inputs, outputs) and (inputs, outputs). So the
    models must have the same layers in the same order; what a Linear reads from a flattened image must be in the
    same order, too, which no mapping can see.

    Args:
        model: of Linear, Conv, ConvTranspose, Embedding and normalisations; frozen ones have numbers, too.
        names: names in the state for parameters of layers that are not plain, as for `export_state`; or for others.
        axes: layouts of these, where they differ, as there.

    Raises:
        StateError: naming every other layer that has parameters without a name in `names`.
    """
    layers: list[Layer] = []
    seen: set[nn.Parameter] = set()  # a tied one belongs to the first that has it
    for path, module in model.named_modules():
        own = {name: p.ndim for name, p in module.named_parameters(recurse=False) if p not in seen}
        seen.update(module.parameters(recurse=False))
        if own:
            kind, roles = _kind(module)
            # (outputs, inputs, height, width) of (height, width, inputs, outputs); both the other way if transposed
            moved = {name: (n - 1, n - 2, *range(n - 2)) for name, n in own.items() if roles.get(name) == "kernel"}
            layers.append(
                Layer(f"{path!r}, {type(module).__name__}", f"{path}." if path else "", list(own), kind, roles, moved)
            )
    return number_layers(layers, names, axes)


def _kind(module: nn.Module) -> tuple[str | None, dict[str, str]]:
    if isinstance(module, nn.Linear):
        return "dense", {"weight": "kernel", "bias": "bias"}
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv", {"weight": "kernel", "bias": "bias"}
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return "conv_transpose", {"weight": "kernel", "bias": "bias"}
    if isinstance(module, nn.Embedding):
        return "embedding", {"weight": "table"}
    if isinstance(module, _NORMS):
        return "norm", {"weight": "scale", "bias": "bias"}
    return None, {}
