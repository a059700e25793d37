"""What an optimizer may be made of: hyperparameters that are allowed, and tensors that are not shards unknowingly."""

from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ada2ms.core.hyperparameters import check
from ada2ms.torch.numbers import number


def check_shards(
    groups: Sequence[dict[str, Any]], given_groups: Sequence[dict[int, int]], shard_group: Any
) -> int | None:
    """Raises where parameters are shards that do not know of each other, and nobody else does.

    Returns:
        The number of entries of the whole model, if the groups' tensors are flat shards of it, which may be padded.
    """
    params = [p for group in groups for p in group["params"]]
    if shard_group is None and any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "Invalid shard_group: None (the parameters are shards of FullyShardedDataParallel, which do not know "
            "of each other: shard_group must be its process group; or use torch.distributed.fsdp.fully_shard)"
        )
    given: dict[int, int] = dict(ChainMap(*given_groups))
    flat = params and all(type(p) is Tensor and p.ndim == 1 and id(p) not in given for p in params)
    if not (flat and given and dist.is_available() and dist.is_initialized()):
        return None
    if shard_group is None and dist.get_world_size() > 1:
        raise ValueError(
            "Invalid shard_group: None (the parameters were replaced by flat shards, as by DeepSpeed's ZeRO, which "
            "do not know of each other: shard_group must be their process group; or use "
            "torch.distributed.fsdp.fully_shard)"
        )
    if len(given_groups) > 1:
        raise ValueError(
            f"Invalid params: {len(given_groups)} groups (flat shards of DeepSpeed's ZeRO are updated one group "
            "after the other, without the others' gradients: there must be one group; or use "
            "torch.distributed.fsdp.fully_shard)"
        )
    return sum(given.values())


def check_group(options: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Raises unless the hyperparameters of a group are allowed; in the words of torch.optim.AdamW if it has any."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    lr, betas, foreach_only = options["lr"], options["betas"], options["foreach"] and not options["capturable"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (betas must be a pair of numbers in [0, 1))")
    for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, Tensor):
            if foreach_only:
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for field, argument, value in (
        ("lr", "lr", lr),
        ("eps", "eps", options["eps"]),
        ("b1", "betas[0]", betas[0]),
        ("b2", "betas[1]", betas[1]),
        ("weight_decay", "weight_decay", options["weight_decay"]),
        ("adaptivity", "adaptivity", options["adaptivity"]),
        ("scope", "scope", options["scope"]),
        ("nonfinite", "nonfinite", options["nonfinite"]),
    ):
        check(field, number(value), argument, schedule=None if field == "adaptivity" else False)
    for name in ("scope", "nonfinite"):
        if options[name] != optimizer[name]:
            raise ValueError(f"Invalid {name}: {options[name]!r} (must be the optimizer's, {optimizer[name]!r})")
