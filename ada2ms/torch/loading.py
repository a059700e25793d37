"""State dicts and pickles as `Ada2MS.__setstate__` takes them: of this version, of earlier ones, of AdamW."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from ada2ms.core.hyperparameters import DEFAULT_NONFINITE, DEFAULT_SCOPE, DEFAULTS, check
from ada2ms.core.schedules import from_dict
from ada2ms.torch.numbers import compute_dtype, count, count_dtype, counts_on_device, number
from ada2ms.torch.shared import SHARED, K, S, check_alike

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
    """A state dict of Ada2MS, of an earlier version of it or of AdamW, as `Ada2MS.__setstate__` takes it.

    Raises:
        TypeError, ValueError: what is the optimizer's differs among groups, an adaptivity is not allowed, or the state
            is that of an optimizer of another kind.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    if len(groups) != len(optimizer.param_groups):
        return state_dict  # torch raises
    _check_kind(groups, state_dict["state"])
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        for key in own.keys() - group.keys() - {"params", "param_names"}:
            group[key] = own[key]
        if group["adaptivity"] is None:
            group["adaptivity"] = own["adaptivity"]
        elif isinstance(group["adaptivity"], dict):
            group["adaptivity"] = from_dict(group["adaptivity"])
        check("adaptivity", number(group["adaptivity"]))
    check_alike(groups)
    state = without_stale(state_dict)
    for pid in (pid for group in groups for pid in group["params"]):
        if isinstance(state.get(pid), dict):
            state[pid] = {k: Kept(x) if isinstance(x, Tensor) and k != "step" else x for k, x in state[pid].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def _check_kind(groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> None:
    """Raises for the state of an optimizer without both moments, whose learning rate means something else, too.

    What a user keeps in the state of a parameter that has had no update is no such state.
    """
    for group in groups:
        for pid in group["params"]:
            values = state.get(pid)
            if not isinstance(values, dict) or not any(isinstance(x, Tensor) for x in values.values()):
                continue
            moments = {"exp_avg", "exp_avg_sq"} & values.keys()
            if len(moments) == 1 or not (moments or "betas" in group):
                found = sorted(map(str, values))
                raise ValueError(
                    f"Invalid state_dict: it has {found} of a parameter (must be of Ada2MS, AdamW or Adam)"
                )


def without_stale(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """What a state dict has under "state"; without s and k if another optimizer, as AdamW, has gone on from them.

    That one counts steps that k does not.
    """
    state: dict[Any, Any] = dict(state_dict["state"])
    listed = Counter(pid for group in state_dict["param_groups"] for pid in group["params"])
    states = {pid: state[pid] for pid in listed if isinstance(state.get(pid), dict)}
    numbers = [(x["step"], x[K], listed[pid]) for pid, x in states.items() if {"step", K} <= x.keys()]
    if any(isinstance(x, Tensor) and (x.is_meta or type(x) is not Tensor) for row in numbers for x in row):
        return state  # shapes, without values
    most = max((float(k) for _, k, _ in numbers), default=0.0)
    if any(float(step) > most * times for step, _, times in numbers):
        for pid, x in states.items():
            state[pid] = {key: value for key, value in x.items() if key not in SHARED}
    return state


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
    moved: dict[Any, Tensor] = {}  # what is one tensor stays one
    for group in groups:
        for key, value in _LATER.items():
            group.setdefault(key, value)
        from_group(group, state)
        for p in group["params"]:
            for key, value in state.get(p, {}).items():
                if isinstance(value, Kept):
                    x = value.tensor
                    dtype = compute_dtype(p.dtype) if key in ("exp_avg", "exp_avg_sq") else x.dtype
                    where = id(x), p.device, dtype
                    state[p][key] = moved[where] = moved[where] if where in moved else x.to(p.device, dtype)
                elif key == "step":
                    device = p.device if counts_on_device(group, p.device) else "cpu"
                    state[p][key] = count(value, count_dtype(group["fused"]), device)
