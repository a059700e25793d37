"""State dicts and pickles as `Ada2MS.__setstate__` takes them: of this version, of earlier ones, of AdamW."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS
from ada2ms.core.schedules import from_dict
from ada2ms.torch.numbers import compute_dtype, count, count_dtype, counts_on_device
from ada2ms.torch.shared import SHARED, K, S

_LATER = {  # what a state dict of an earlier version may lack
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "adaptivity": DEFAULTS.adaptivity,
    "scope": DEFAULT_SCOPE,
    "nonfinite": DEFAULT_NONFINITE,
}


@dataclass(frozen=True)
class Kept:
    """A tensor that torch's load_state_dict passes on as it is, in place of casting it to the parameter's dtype."""

    tensor: Tensor


def translate(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """A state dict of Ada2MS, of an earlier version of it or of AdamW, as `Ada2MS.__setstate__` takes it."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    if len(groups) != len(optimizer.param_groups):
        return state_dict  # torch raises
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for key in own.keys() - group.keys() - {"params", "param_names"}:
            group[key] = own[key]
        if group["adaptivity"] is None:
            group["adaptivity"] = own["adaptivity"]
        elif isinstance(group["adaptivity"], dict):
            group["adaptivity"] = from_dict(group["adaptivity"])
    state = dict(state_dict["state"])
    for pid in (pid for group in groups for pid in group["params"]):
        if isinstance(state.get(pid), dict):
            state[pid] = {k: Kept(x) if isinstance(x, Tensor) and k != "step" else x for k, x in state[pid].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def from_group(group: dict[str, Any], state: Any) -> None:
    """Moves s, k and the skipped steps from a group, where an earlier version had them, to the group's parameters."""
    found = {key: group.pop(key) for key in SHARED if key in group}
    if K not in found:
        return
    started = [p for p in group["params"] if "exp_avg" in state.get(p, ())]
    if not started and group["params"] and float(found[K]) > 0:
        started = [min(group["params"], key=lambda p: p.numel())]  # which gets the rest of its state when it is tied
    for p in started:
        values = state[p]
        if K in values:
            continue
        if S in values or group["scope"] == "tensor":  # the group's s is nobody's
            values.update({key: x for key, x in found.items() if key != S})
        else:
            values.update(found)


def restore(groups: list[dict[str, Any]], state: Any) -> None:
    """Completes what was unpickled or loaded: options that came later, and tensors of the right type and device."""
    for group in groups:
        for key, value in _LATER.items():
            group.setdefault(key, value)
        from_group(group, state)
        for p in group["params"]:
            for key, value in state.get(p, {}).items():
                if isinstance(value, Kept):
                    dtype = compute_dtype(p.dtype) if key in ("exp_avg", "exp_avg_sq") else value.tensor.dtype
                    state[p][key] = value.tensor.to(p.device, dtype)
                elif key == "step":
                    device = p.device if counts_on_device(group, p.device) else "cpu"
                    state[p][key] = count(value, count_dtype(group["fused"]), device)
