"""Parameter groups by the names of the parameters, as every framework has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ada2ms.core.groups import Group, assign, check_groups
from ada2ms.core.hyperparameters import check
from ada2ms.torch.checks import check_pair
from ada2ms.torch.numbers import number


def param_groups(
    model: nn.Module | Mapping[str, Tensor],
    groups: Sequence[Group],
    lr: float | Tensor | None = None,
    betas: tuple[float | Tensor, float | Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Ordinary parameter groups, for `Ada2MS` or another optimizer with its arguments.

    Args:
        model: the module, whose `named_parameters` are all in one of the groups, frozen ones too, and tied ones under
            their first name; or its parameters by name. Wrappers put a prefix before each name: "module." of
            DistributedDataParallel, "_orig_mod." of torch.compile.
        groups: a parameter is in the first that matches it; those that no group matches make the first group that is
            returned, with the optimizer's own hyperparameters.
        lr: the optimizer's learning rate, which each group then has times its `lr_scale`, so that schedulers that start
            from a group's own keep the proportions; needed if a group has an `lr_scale`. OneCycleLR and CyclicLR start
            from none: give them a list with a rate for each group.
        betas: the optimizer's betas; needed if a group has only one of `b1` and `b2`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed; a group has no parameter.

    Example:
        >>> import torch
        >>> from ada2ms.core import NO_DECAY, Group
        >>> from ada2ms.torch import Ada2MS, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 1))
        >>> params = param_groups(model, [Group("^0", lr_scale=0.1), NO_DECAY], lr=1e-3)
        >>> [(len(group["params"]), group["lr"], group.get("weight_decay")) for group in params]
        [(1, 0.001, None), (1, 0.0001, None), (1, 0.001, 0.0)]
        >>> optimizer = Ada2MS(params, weight_decay=0.1)
    """
    groups = check_groups(groups)
    named: dict[Tensor, str] = {}
    for name, p in named_parameters(model).items():
        if is_lazy(p):
            raise ValueError(f"Invalid model: {name!r} has no shape yet (every lazy layer must have had an input)")
        named.setdefault(p, name)
    found = assign(groups, list(named.values()), [p.ndim for p in named])
    if lr is not None:
        check("lr", number(lr), schedule=False)
    if betas is not None:
        check_pair(betas)
        for field, argument, value in zip(("b1", "b2"), ("betas[0]", "betas[1]"), betas, strict=True):
            check(field, number(value), argument, schedule=False)
    own: dict[str, Any] = {} if lr is None else {"lr": lr}
    own |= {} if betas is None else {"betas": betas}
    made = []
    for i, options in [(None, own), *((i, _options(i, group, lr, betas)) for i, group in enumerate(groups))]:
        params = [p for p, index in zip(named, found, strict=True) if index == i]
        if params:
            made.append({"params": params, **options})
    return made


def named_parameters(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The parameters of a model by name.

    Raises:
        TypeError: it is neither a module nor tensors by name.
    """
    if isinstance(model, nn.Module):
        return dict(model.named_parameters())
    if isinstance(model, Mapping) and all(isinstance(x, Tensor) for x in model.values()):
        return model
    kind = type(model).__name__  # since its content may be long
    raise TypeError(
        f"Invalid model: of type {kind} (must be a torch.nn.Module, or a mapping of its parameters by name)"
    )


def _options(i: int, group: Group, lr: Any, betas: Any) -> dict[str, Any]:
    """The keys of a group beside its parameters."""
    options = group.hyper()
    b1, b2 = options.pop("b1", None), options.pop("b2", None)
    if (b1 is None) != (b2 is None) and betas is None:
        raise ValueError(f"Invalid betas: None (must be the optimizer's, since groups[{i}] has but one: {group})")
    if b1 is not None or b2 is not None or betas is not None:
        options["betas"] = (betas[0] if b1 is None else b1, betas[1] if b2 is None else b2)
    if lr is not None:
        options["lr"] = lr * group.lr_scale
    elif group.lr_scale != 1:
        raise ValueError(f"Invalid lr: None (must be the optimizer's, since groups[{i}] has a factor of it: {group})")
    return options
