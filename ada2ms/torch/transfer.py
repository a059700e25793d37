"""The optimizer's state to and from other frameworks; `ada2ms.core.state` says what it consists of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ada2ms.core.schedules import from_dict
from ada2ms.core.state import (
    Axes,
    Entry,
    Extra,
    Extras,
    Group,
    Names,
    Receipt,
    Report,
    State,
    StateError,
    Target,
    Transfer,
    check_verify,
    from_portable,
    in_state,
    optimizer_problems,
    plain_hyperparameters,
    portable_extras,
    to_portable,
    without_moments,
)
from ada2ms.core.state import arguments as portable_arguments
from ada2ms.torch import shared
from ada2ms.torch.groups import named_parameters
from ada2ms.torch.loading import without_stale
from ada2ms.torch.numbers import compensation_dtype, compute_dtype, numpy, tensor
from ada2ms.torch.optimizer import Ada2MS
from ada2ms.torch.receipt import Gradients, Model, verification

_SLOTS = {"step", "exp_avg", "exp_avg_sq"}  # what Ada2MS, AdamW and Adam keep of a parameter
_OTHER_SLOTS = {"max_exp_avg_sq", "mu_product"}  # amsgrad's, and NAdam's


def export_state(
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    names: Names = None,
    axes: Axes = None,
    extras: Extras = None,
    values: bool = True,
    receipt: Receipt | None = None,
) -> State:
    """The state of an optimizer, to go on from in any framework.

    Args:
        model: the module, or its parameters by name.
        optimizer: Ada2MS, torch.optim.AdamW or torch.optim.Adam, over parameters of the model.
        names: what the state is to call a parameter, for each name here, as a mapping or a function; those left out
            keep their names. One that is cut, as a packed projection, has several names.
        axes: for a name here, how an array of the state is to be transposed to have this layout, or a function that
            cuts an array here; as in `import_state`.
        extras: what the state is to call an array that the optimizer has no moments of, for each name here: running
            statistics, which `plain_layers` gives, or values of frozen parameters. They are in `State.extras`, where
            you may put others.
        values: whether the parameters' values are to travel too, and extras.
        receipt: the steps since an earlier state, for `verify` of `import_state`.

    Returns:
        A state with copies of everything that the optimizer is over. Its `notes` name parameters that it is not over.

    Raises:
        StateError: listing everything that cannot be exported.
    """
    named = named_parameters(model)
    called = _names(named, optimizer)
    groups = [[called[p] for p in group["params"]] for group in optimizer.param_groups]
    state = from_state_dict(optimizer.state_dict(), groups, named, names=names, axes=axes, values=values)
    beside = _beside(model, named, called) if values else {}
    found = portable_extras({name: numpy(x) for name, x in beside.items() if name in (extras or {})}, extras, axes)
    left = [name for name in beside if name in named and name not in (extras or {})]
    notes = without_moments(left, imported=False)
    source = f"torch {torch.__version__}: {type(optimizer).__name__}"
    own = None if receipt is None else receipt.copy()
    return replace(state, extras=found, source=source, notes=notes, receipt=own)


def from_state_dict(
    state_dict: Mapping[str, Any],
    called: Sequence[Sequence[str]],
    params: Mapping[str, Tensor],
    *,
    names: Names = None,
    axes: Axes = None,
    values: bool = True,
) -> State:
    """The state that a state dict of Ada2MS, AdamW or Adam holds.

    Args:
        state_dict: of an optimizer.
        called: the name of each parameter of each group.
        params: the model's parameters by name; those that no update has reached yet must be there.
        names: as for `export_state`; and so are the others.
        axes: as there.
        values: as there.

    Raises:
        StateError: listing every parameter of which it has another state, or none.
    """
    entries, groups, problems = {}, [], []
    state_dict = {**state_dict, "state": without_stale(state_dict)}
    pairs, skipped = _shared_numbers(state_dict)
    for given, own, pair in zip(state_dict["param_groups"], called, pairs, strict=True):
        for name, index in zip(own, given["params"], strict=True):
            state = state_dict["state"].get(index, {})
            value = params.get(name)
            if state and not (set(state) >= _SLOTS and _OTHER_SLOTS.isdisjoint(state)):
                problems.append(f"{name!r} has {sorted(state)} (must be of Ada2MS, AdamW or Adam, and without amsgrad)")
                continue
            if value is None and not state:
                problems.append(f"nothing is known of {name!r}: it has had no update, and its value is not there")
                continue
            s = state.get(shared.S) if state else 0.0
            zeros = np.zeros((), np.float32) if value is None else np.zeros_like(numpy(value))
            entries[name] = Entry(
                exp_avg=numpy(state["exp_avg"]) if state else zeros,
                exp_avg_sq=numpy(state["exp_avg_sq"]) if state else zeros.copy(),
                step=int(state.get("step", 0)),
                global_exp_avg_sq=None if s is None or given.get("scope") != "tensor" else float(s),
                param=numpy(value) if values and value is not None else None,
                compensation=numpy(state[shared.COMPENSATION]) if shared.COMPENSATION in state else None,
            )
            if np.iscomplexobj(entries[name].exp_avg):
                entries[name] = _in_one(entries[name])
        hyper = {**given, "b1": given["betas"][0], "b2": given["betas"][1]}
        if given.get("decoupled_weight_decay") is False and given["weight_decay"]:
            del hyper["weight_decay"]  # Adam's, which is a part of the gradient, has no place in the rule
        if isinstance(hyper.get("adaptivity"), dict):
            hyper["adaptivity"] = from_dict(hyper["adaptivity"])
        groups.append(Group(list(own), plain_hyperparameters(hyper), *pair))
    if problems:
        raise StateError("The state cannot be exported", problems)
    entries, renamed = to_portable(entries, names, axes, params)
    for group in groups:
        group.params = in_state(renamed, group.params)
    first = state_dict["param_groups"][0] if state_dict["param_groups"] else {}
    choices = shared.plain_choices({name: first[name] for name in shared.CHOICES if name in first})
    exported = State(entries, groups, **choices, skipped=skipped)
    return exported.with_global(exported.scope) if "scope" in first else exported  # for groups that have not started


def import_state(
    model: Model,
    optimizer: torch.optim.Optimizer,
    state: State,
    *,
    names: Names = None,
    axes: Axes = None,
    extras: Extras = None,
    values: bool = True,
    cast: bool = False,
    verify: int = 0,
    gradients: Gradients = None,
) -> Report:
    """Gives an optimizer, and the parameters, a state of any framework; hyperparameters stay as they are.

    Args:
        model: the module, or its parameters by name.
        optimizer: Ada2MS, torch.optim.AdamW or torch.optim.Adam, over parameters of the model.
        state: of `export_state`, in this framework or another, or of a file.
        names: what the state calls a parameter, for each name here, as a mapping or a function; those left out have the
            same name.
        axes: for a name here, how the state's array is transposed to have this layout: (1, 0) for the weight of a
            Linear that is a kernel of (inputs, outputs) in the state. Or a function that cuts an array here into those
            of the state that `names` has for it, by indexing, transposing and reshaping alone: `lambda w: [x.T for x in
            np.split(w, 3)]`. The way back follows from it.
        extras: what the state calls an array that the optimizer has no moments of, for each name here.
        values: whether the parameters' values come from the state too, and extras.
        cast: whether values may be rounded to the types here.
        verify: how many recorded steps there must be in the state's receipt. All that are there are made once more
            beforehand, by copies of the model and this optimizer, and `Report.verification` says whether the result is
            the state: whatever it says, the state is imported. A recorded learning rate is taken in place of that here,
            for groups by their factors. 0: nothing is verified.
        gradients: with `verify`, `gradients(model, step)` computes the gradients of a recorded step, by backward passes
            through the copy of the model that it is given: if they are those recorded, all arrays are where the model
            reads them. `step.batch` tells which batch that was.

    Returns:
        What went where; to be printed.

    Raises:
        StateError: listing everything that is missing, superfluous, or of a wrong shape or type; nothing has changed.
    """
    check_verify(verify)
    named = named_parameters(model)
    called = _names(named, optimizer)
    ours = isinstance(optimizer, Ada2MS)
    beside = _beside(model, named, called)
    complex_halves = [name for p, name in called.items() if p.dtype == torch.complex32]
    if problems := [f"type: {name!r} is complex32, which NumPy does not have" for name in complex_halves]:
        raise StateError("The state does not fit", problems)
    targets = {
        called[p]: Target(tuple(p.shape), _dtypes(p, ours, group), i)
        for i, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    fitted = from_portable(
        state,
        targets,
        names=names,
        axes=axes,
        scope=optimizer.param_groups[0]["scope"] if ours else None,
        values=values,
        cast=cast,
        groups=len(optimizer.param_groups),
        others=named,
        extras=extras,
        beside={name: Extra(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in beside.items()},
    )
    transfer = Transfer(import_state, export_state, names, axes, cast)
    fitted.report.verification = verification(model, optimizer, state, verify, targets, transfer, gradients)
    state_dict = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state_dict["state"] = to_state([fitted.entries[called[p]] for p in params], own_s=ours)
    if ours:
        set_shared_numbers(state_dict, fitted.groups, fitted.skipped)
    optimizer.load_state_dict(state_dict)
    with torch.no_grad():
        for p, name in called.items():
            if (value := fitted.entries[name].param) is not None:
                p.copy_(tensor(value))
        for name, array in fitted.extras.items():
            beside[name].copy_(tensor(array))
    left = [name for name in beside if values and name in named and name not in fitted.extras]
    fitted.report.notes += without_moments(left, imported=True)
    return fitted.report


def to_state(entries: Sequence[Entry], *, own_s: bool) -> dict[int, dict[str, Tensor]]:
    """What a state dict of torch has under "state"; a parameter that has had no update has none, but for what is left
    of its value.
    """
    state = {}
    for index, entry in enumerate(entries):
        if entry.step or np.any(0 if entry.compensation is None else entry.compensation):
            state[index] = {
                "step": torch.tensor(float(entry.step), dtype=torch.float32, device="cpu"),
                "exp_avg": tensor(entry.exp_avg),
                "exp_avg_sq": tensor(entry.exp_avg_sq),
            }
            if own_s and entry.global_exp_avg_sq is not None:
                state[index][shared.S] = torch.tensor(entry.global_exp_avg_sq, dtype=torch.float64, device="cpu")
            if entry.compensation is not None:
                state[index][shared.COMPENSATION] = tensor(entry.compensation)
    return state


def arguments(state: State, names: Names = None) -> dict[str, Any]:
    """The arguments for `Ada2MS` that continue a state: those of its hyperparameters that it knows.

    If the state's groups differ there are `groups`, too, which are for `param_groups`:

        options = arguments(state)
        params = param_groups(model, options.pop("groups", []), options["lr"], options["betas"])
        optimizer = Ada2MS(params, **options)

    Args:
        state: of `export_state`, in this framework or another, or of a file.
        names: what the state calls a parameter, for each name here, as for `import_state`; no function where groups
            differ.

    Raises:
        StateError: the state has groups that differ, and not all hyperparameters of each are known, or `names` is a
            function.
    """
    return portable_arguments(state, "torch", names)


def _beside(model: Model, named: Mapping[str, Tensor], called: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What the optimizer has no moments of: parameters, and a module's buffers."""
    buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    return {**{name: p for name, p in named.items() if p not in called}, **buffers}


def _in_one(entry: Entry) -> Entry:
    """With param + compensation as its value, since a state has no complex numbers of 16 bits."""
    if entry.param is None or entry.compensation is None:
        return replace(entry, compensation=None)
    return replace(entry, param=entry.param + entry.compensation, compensation=None)


def _names(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The model's name of each parameter of the optimizer."""
    known = {p: name for name, p in named.items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    problems = [f"a parameter of shape {tuple(p.shape)} is not in the model" for p in params if p not in known]
    problems += [
        f"{known[p]!r} is sharded (gather it first: torch.distributed.checkpoint.state_dict has full_state_dict)"
        for p in params
        if p in known and hasattr(p, "device_mesh")
    ]
    problems += optimizer_problems(
        type(optimizer).__name__,
        known=isinstance(optimizer, (Ada2MS, torch.optim.Adam, torch.optim.AdamW)),
        amsgrad=any(group.get("amsgrad") for group in optimizer.param_groups),
    )
    if problems:
        raise StateError("The optimizer does not fit", problems)
    return {p: known[p] for p in params}


def _dtypes(p: Tensor, ours: bool, group: dict[str, Any]) -> dict[str, str]:
    moments = compute_dtype(p.dtype) if ours else p.dtype
    names = {"param": p.dtype, "exp_avg": moments, "exp_avg_sq": moments}
    if ours and shared.choice(group, "compensated") and (dtype := compensation_dtype(p.dtype)) is not None:
        names[shared.COMPENSATION] = dtype
    return {slot: str(dtype).removeprefix("torch.") for slot, dtype in names.items()}


def _shared_numbers(state_dict: Mapping[str, Any]) -> tuple[list[tuple[float | None, int]], int]:
    """What `(s, k)` each group of a state dict has, and the number of skipped steps; s is None where there is none.

    They lie with the parameters; an earlier version had them in the groups. Of AdamW there are none.
    """
    found: list[tuple[float | None, int]] = []
    skipped, steps = 0, [0]
    for group in state_dict["param_groups"]:
        values = next((x for i in group["params"] if shared.K in (x := state_dict["state"].get(i, {}))), group)
        steps.append(int(values.get(shared.K, 0)))
        skipped = max(skipped, int(values.get(shared.SKIPPED, 0)))
        s = values.get(shared.S) if group.get("scope") == "model" else None
        found.append((None if s is None else float(s), steps[-1]))
    if any(group.get("scope") == "tensor" for group in state_dict["param_groups"]):  # k of groups that have not started
        found = [(None, max(steps)) for _ in found]
    return found, skipped


def set_shared_numbers(state_dict: Mapping[str, Any], pairs: Sequence[tuple[float | None, int]], skipped: int) -> None:
    """Gives the parameters of a state dict the numbers that they share; of a group one at least, if any is not 0.

    Args:
        state_dict: is changed.
        pairs: s and k of each group; s is None with scope "tensor", where groups get one tensor for k.
        skipped: the number of skipped steps.
    """
    state, n = state_dict["state"], torch.tensor(float(skipped), dtype=torch.float32, device="cpu")
    counts = {k: torch.tensor(float(k), dtype=torch.float32, device="cpu") for _, k in pairs}
    for group, (s, k) in zip(state_dict["param_groups"], pairs, strict=True):
        numbers = {shared.K: counts[k], shared.SKIPPED: n}
        if s is not None:
            numbers[shared.S] = torch.tensor(s, dtype=torch.float64, device="cpu")
            numbers[shared.K] = counts[k].clone()
        started = [i for i in group["params"] if i in state]
        if not started and (k or skipped):
            started = group["params"][:1]  # which gets the rest when it is loaded
        for i in started:
            state[i] = {**state.get(i, {}), **numbers}
