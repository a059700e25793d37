"""What an optimizer may be made of: hyperparameters that are allowed, and tensors that are not shards unknowingly."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ada2ms.core.hyperparameters import check
from ada2ms.torch.numbers import number
from ada2ms.torch.reduce import numel
from ada2ms.torch.shared import CHOICES, choice


class Given:
    """The parameters that an optimizer was given, among which are none that were put in their place."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # entries of each group
        self._count = 0  # of the parameters
        # Those that could be flat shards. Of others there are no weak references, with which
        # `torch.utils.swap_tensors`, that `Module.to` may convert by, could not exchange a parameter's content.
        self._flat: dict[int, weakref.ref[Tensor]] = {}

    def add(self, params: Sequence[Tensor]) -> None:
        self.sizes.append(sum(map(numel, params)))
        self._count += len(params)
        self._flat.update({id(p): weakref.ref(p) for p in params if _may_be_flat(p)})

    def __contains__(self, p: Tensor) -> bool:
        found = self._flat.get(id(p))
        return found is not None and found() is p  # ids are used again

    def is_divided_in(self, params: Sequence[Tensor], world: int) -> bool:
        """Whether these may be flat shards of the model, or of one group, padded as DeepSpeed does it."""
        if world == 1 and len(params) == self._count:  # nothing was made one
            return False
        size = sum(map(numel, params))
        return any(
            whole <= n * size < whole + 2 * n * len(self.sizes) + (n - 1) * self._count
            for whole in {sum(self.sizes), *self.sizes}
            for n in range(1, world + 1)
        )


def _may_be_flat(p: Tensor) -> bool:
    """Whether it may be a flat shard: these are vectors, and no `nn.Parameter`."""
    return type(p) is Tensor and p.ndim == 1


def check_shard_group(shard_group: Any) -> None:
    """Raises unless it is a process group, or None; `new_group` gives a number to processes that are no members."""
    if shard_group is None or (dist.is_available() and isinstance(shard_group, dist.ProcessGroup)):
        return
    raise TypeError(
        f"Invalid shard_group: {shard_group!r} (shard_group must be a torch.distributed.ProcessGroup that has this "
        "process, or None)"
    )


def check_fsdp(params: Sequence[Tensor], shard_group: Any, scope: str) -> None:
    """Raises for shards of FullyShardedDataParallel without their process group, or with scope "tensor"."""
    if not any(getattr(p, "_fsdp_flattened", False) for p in params):
        return
    if scope == "tensor":
        raise ValueError(
            "Invalid scope: 'tensor' (the parameters are shards of FullyShardedDataParallel, which may be parts of a "
            "tensor: scope must be 'model'; or use torch.distributed.fsdp.fully_shard)"
        )
    if shard_group is None:
        raise ValueError(
            "Invalid shard_group: None (the parameters are shards of FullyShardedDataParallel, which do not know "
            "of each other: shard_group must be its process group; or use torch.distributed.fsdp.fully_shard)"
        )


def whole_size(groups: Sequence[dict[str, Any]], given: Given, shard_group: Any) -> int | None:
    """Raises where parameters are shards that do not know of each other, and nobody else does.

    Returns:
        The number of entries of the whole model, if the groups' tensors are flat shards of it, which may be padded.
    """
    params = [p for group in groups for p in group["params"]]
    scope = groups[0]["scope"] if groups else "model"
    check_fsdp(params, shard_group, scope)
    flat = params and all(_may_be_flat(p) and p not in given for p in params)
    if not (flat and given.sizes and dist.is_available() and dist.is_initialized()):
        return None
    world = dist.get_world_size(shard_group)
    if not given.is_divided_in(params, world):
        return None
    if shard_group is None and world > 1:
        raise ValueError(
            "Invalid shard_group: None (the parameters were replaced by flat shards, as by DeepSpeed's ZeRO, which "
            "do not know of each other: shard_group must be their process group; or use "
            "torch.distributed.fsdp.fully_shard)"
        )
    if scope == "tensor" and world > 1:
        raise ValueError(
            "Invalid scope: 'tensor' (the parameters were replaced by flat shards, as by DeepSpeed's ZeRO, which are "
            "not the model's tensors: scope must be 'model'; or use torch.distributed.fsdp.fully_shard)"
        )
    if len(given.sizes) > 1:
        raise ValueError(
            f"Invalid params: {len(given.sizes)} groups (flat shards of DeepSpeed's ZeRO are updated one group "
            "after the other, without the others' gradients: there must be one group; or use "
            "torch.distributed.fsdp.fully_shard)"
        )
    return sum(given.sizes)


def check_pair(betas: Any) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (betas must be a pair of numbers in [0, 1))")


def check_group(options: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Raises unless the hyperparameters of a group are allowed; in the words of torch.optim.AdamW if it has any."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    lr, betas, foreach_only = options["lr"], options["betas"], options["foreach"] and not options["capturable"]
    check_pair(betas)
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
        *[(name, name, choice(options, name)) for name in CHOICES],
    ):
        check(field, number(value), argument, schedule=None if field == "adaptivity" else False)
    for name in CHOICES:
        if choice(options, name) != choice(optimizer, name):
            raise ValueError(
                f"Invalid {name}: {choice(options, name)!r} (must be the optimizer's, {choice(optimizer, name)!r})"
            )
