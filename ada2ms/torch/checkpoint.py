"""Checkpoints of torch that need no model to be read, and the state of `ada2ms.core.state`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from ada2ms.core.atomic import write_whole
from ada2ms.core.schedules import AdaptivitySchedule
from ada2ms.core.state import Array, State, StateError
from ada2ms.torch.numbers import numpy, tensor
from ada2ms.torch.shared import CHOICES, leave_out_defaults
from ada2ms.torch.transfer import from_state_dict, set_shared_numbers, to_state

_OPTIMIZER: Final = ("optimizer", "optimizer_state_dict", "optimizer_states")
_MODEL: Final = ("model", "model_state_dict", "state_dict")


def read(path: Path, names: Sequence[str] | None = None) -> State:
    """The state in a file of `torch.save`: the state dict of an optimizer (Ada2MS, AdamW or Adam), or a dict with one
    under "optimizer" or "optimizer_state_dict", or a list of one under "optimizer_states", as Lightning has it; and for
    the values, the model's under "model", "model_state_dict" or "state_dict". What the optimizer does not
    have of these, such as running statistics, is in the state's extras. Loaded with `weights_only=True`.

    Args:
        path: the file.
        names: of the optimizer's parameters, in its order; by default those that it was given, if it was
            (`named_parameters()`).

    Raises:
        StateError: the file is nothing like that, or does not name its parameters.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds: pickle's, zip's, torch's own
        raise StateError(
            f"Cannot read {str(path)!r}", [f"torch.load(weights_only=True): {type(error).__name__}: {error}"]
        ) from None
    held: Mapping[str, Any] = content if isinstance(content, Mapping) else {}
    optimizer = held if "param_groups" in held else next((held[key] for key in _OPTIMIZER if key in held), None)
    if isinstance(optimizer, list) and len(optimizer) == 1:
        optimizer = optimizer[0]
    if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= set(optimizer):
        problem = f"no state dict of one optimizer: its keys are {sorted(map(str, held))} (one must be in {_OPTIMIZER})"
        raise StateError(f"Cannot read {str(path)!r}", [problem])
    groups = optimizer["param_groups"]
    if not (isinstance(groups, list) and all(isinstance(g, Mapping) and {"params", "betas"} <= set(g) for g in groups)):
        problem = "an optimizer without betas (must be of Ada2MS, AdamW or Adam)"
        raise StateError(f"Cannot read {str(path)!r}", [problem])
    model: Mapping[str, Any] = next((held[key] for key in _MODEL if key in held and held is not optimizer), {})
    counts = [len(group["params"]) for group in groups]
    if names is None:
        called = [group.get("param_names") for group in groups]
        if None in called:
            problem = "it does not name its parameters: the optimizer was not made from named_parameters(); give names"
            raise StateError(f"Cannot read {str(path)!r}", [problem])
    else:
        if len(names) != sum(counts):
            raise StateError(f"Cannot read {str(path)!r}", [f"{len(names)} names for its {sum(counts)} parameters"])
        rest = iter(names)
        called = [[next(rest) for _ in range(n)] for n in counts]
    return replace(from_state_dict(optimizer, called, model), extras=_extras(model, called))


def _extras(model: Mapping[str, Any], called: Sequence[Sequence[str]]) -> dict[str, Array]:
    """What of a model is in no optimizer; a tied parameter's other names are none of it."""
    parameters = {name for own in called for name in own}
    tied = {x.data_ptr() for name, x in model.items() if name in parameters and x.numel()}
    rest = {name: x for name, x in model.items() if name not in parameters and isinstance(x, torch.Tensor)}
    return {name: numpy(x) for name, x in rest.items() if x.data_ptr() not in tied}


def write(state: State, path: Path) -> None:
    """Writes, whole or not at all, {"optimizer": a state dict that Ada2MS and AdamW load, "model": the values, if the
    state has them, and its extras}.
    """
    entries = [state.parameters[name] for group in state.groups for name in group.params]
    groups, start = [], 0
    for group in state.groups:
        hyper = dict(group.hyper)
        if isinstance(hyper.get("adaptivity"), AdaptivitySchedule):
            hyper["adaptivity"] = hyper["adaptivity"].to_dict()
        if "b1" in hyper and "b2" in hyper:
            hyper["betas"] = hyper.pop("b1"), hyper.pop("b2")
        hyper.pop("lr_scale", None)  # `lr`, if it is known, is that of the group
        hyper |= {"params": list(range(start, start + len(group.params))), "param_names": list(group.params)}
        if state.has_global:
            hyper |= {name: getattr(state, name) for name in CHOICES}
            leave_out_defaults(hyper)
        groups.append(hyper)
        start += len(group.params)
    states = to_state(entries, own_s=True)
    content: dict[str, Any] = {"optimizer": {"state": states, "param_groups": groups}}
    if state.has_global:
        pairs = [(group.global_exp_avg_sq, group.global_step) for group in state.groups]
        set_shared_numbers(content["optimizer"], pairs, state.skipped)
    values = {name: tensor(entry.param) for name, entry in state.parameters.items() if entry.param is not None}
    values |= {name: tensor(array) for name, array in state.extras.items()}
    if values:
        content["model"] = values
    write_whole(path, lambda file: torch.save(content, file))
