"""`ada2ms state`: looks into, compares and converts optimizer states without their models.

Besides states, it reads the checkpoints that say what is in them: those of torch, whose state dicts name things or can
be given names; those of `model.save` of Keras, which describe the model (of plain layers); and those of flax
(`flax.serialization.to_bytes`, in a file *.msgpack) and Orbax (a folder), if there is one state of Ada2MS or Adam
somewhere in their tree. These have no hyperparameters, and names and layouts are those of the tree. It does not read
those of `save_weights` of Keras, which number the optimizer's variables, nor those of Orbax in which leaves have counts
or s that differ, since their order is not kept: for these, load them as usual and call `export_state`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ada2ms.cli.arguments import reported
from ada2ms.core.state import Array, State, StateError

_KINDS = {
    ".safetensors": "state",
    ".pt": "torch",
    ".pth": "torch",
    ".keras": "keras",
    ".msgpack": "JAX",
}  # and a folder is JAX', of Orbax
_CONVERSIONS = (("torch", "state"), ("keras", "state"), ("JAX", "state"), ("state", "torch"), ("keras", "torch"))


def add(commands: Any) -> None:
    """Adds `state show`, `state diff` and `state convert` to the command line."""
    parser = commands.add_parser(
        "state",
        help="show, compare and convert optimizer states",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True)
    files = "a state (.safetensors), or a checkpoint of torch (.pt, .pth), Keras (.keras), flax (.msgpack) or Orbax"

    command = actions.add_parser("show", help="what a file holds")
    command.set_defaults(run=reported(show, StateError, OSError, ImportError))
    command.add_argument("file", type=Path, help=files)

    command = actions.add_parser("diff", help="how far two states are from each other; exit status 0 if they are equal")
    command.set_defaults(run=reported(diff, StateError, OSError, ImportError))
    command.add_argument("file", type=Path, help=files)
    command.add_argument("other", type=Path, help=files)

    command = actions.add_parser(
        "convert", help="from torch, Keras or JAX to a state, or from a state or Keras to torch"
    )
    command.set_defaults(run=reported(convert, StateError, OSError, ImportError))
    command.add_argument("file", type=Path, help=files)
    command.add_argument("to", type=Path, help="a state (.safetensors), or a checkpoint of torch (.pt, .pth)")
    for action in actions.choices.values():
        names = "a JSON list of the parameters' names in the optimizer's order, if a checkpoint of torch has none"
        action.add_argument("--names", type=Path, help=names)


def show(arguments: argparse.Namespace) -> int:
    """Prints parameters, counts and hyperparameters."""
    state = _read(arguments.file, arguments.names)
    if state.source:
        print(f"source      {state.source}")
    print(f"scope       {state.scope}")
    print(f"nonfinite   {state.nonfinite}, {state.skipped} steps skipped")
    if state.max_norm is not None:
        print(f"max_norm    {state.max_norm}")
    if state.compensated:
        print("compensated parameters of 16 bits keep what rounding loses")
    for i, group in enumerate(state.groups):
        hyper = ", ".join(f"{name} {value}" for name, value in group.hyper.items())
        print(
            f"group {i}     {len(group.params)} parameters; s {group.global_exp_avg_sq}, k {group.global_step}; {hyper}"
        )
    width = max((len(name) for name in state.parameters), default=0)
    for name, entry in state.parameters.items():
        norms = "  ".join(f"|{slot}| {np.linalg.norm(array.ravel()):.3e}" for slot, array in entry.slots().items())
        print(f"{name:{width}}  {entry.exp_avg.shape!s:16}  {entry.exp_avg.dtype}  step {entry.step}  {norms}")
    if state.receipt is not None:
        print(f"receipt     {len(state.receipt.steps)} steps, from {state.receipt.start.source}")
        for i, step in enumerate(state.receipt.steps, 1):
            rate = "" if step.lr is None else f", lr {step.lr}"
            print(
                f"  step {i}    gradients of {len(step.gradients)} parameters{rate}, batch {step.batch or 'not given'}"
            )
    for name, array in state.extras.items():
        print(f"extra {name}  {array.shape}  {array.dtype}  |.| {np.linalg.norm(_wide(array).ravel()):.3e}")
    _print_notes(state)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Prints what differs; 0 if nothing does, 1 if something does."""
    left, right = (_read(file, arguments.names) for file in (arguments.file, arguments.other))
    lines = differences(left, right)
    print("\n".join(lines) if lines else "equal")
    return 1 if lines else 0


def differences(left: State, right: State) -> list[str]:
    """One line for each thing that differs; sources do not count."""
    lines = []
    for name in dict.fromkeys([*left.parameters, *right.parameters]):
        if name not in left.parameters or name not in right.parameters:
            lines.append(f"{name}: in the {'first' if name in left.parameters else 'second'} only")
            continue
        a, b = left.parameters[name], right.parameters[name]
        lines += [f"{name}: {line}" for line in _unequal_arrays(a.slots(), b.slots())]
        for field in ("step", "global_exp_avg_sq"):
            lines += _unequal(f"{name}: {field}", getattr(a, field), getattr(b, field))
    lines += [f"extra {line}" for line in _unequal_arrays(left.extras, right.extras)]
    for field in ("scope", "nonfinite", "skipped", "max_norm", "compensated"):
        lines += _unequal(field, getattr(left, field), getattr(right, field))
    lines += _unequal("recorded steps", *(0 if x.receipt is None else len(x.receipt.steps) for x in (left, right)))
    lines += _unequal("groups", len(left.groups), len(right.groups))
    for i, (g, h) in enumerate(zip(left.groups, right.groups, strict=False)):
        for field in ("params", "hyper", "global_exp_avg_sq", "global_step"):
            lines += _unequal(f"group {i}: {field}", getattr(g, field), getattr(h, field))
    return lines


def _unequal_arrays(left: Mapping[str, Array], right: Mapping[str, Array]) -> list[str]:
    """One line for each array, by its name, that is in one only or is not the same in both."""
    lines = []
    for name in dict.fromkeys([*left, *right]):
        x, y = left.get(name), right.get(name)
        if x is None or y is None:
            lines.append(f"{name} in the {'second' if x is None else 'first'} only")
        elif x.shape != y.shape:
            lines.append(f"{name} of shape {x.shape} and {y.shape}")
        elif not np.array_equal(x, y, equal_nan=x.dtype.kind in "fc" and y.dtype.kind in "fc"):
            x, y = _wide(x), _wide(y)
            either = ~(np.isnan(x) & np.isnan(y))  # a NaN differs from a number, and not from a NaN
            largest = float(np.max(np.abs(y[either])))
            error = float(np.max(np.abs(x[either] - y[either])))
            share = error / largest if largest else np.inf
            lines.append(f"{name} differs by {error:.3e}, {share:.1e} of the largest")
    return lines


def _wide(array: Array) -> Array:
    """Numbers of any kind as floating-point numbers, whose differences are numbers."""
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def convert(arguments: argparse.Namespace) -> int:
    """Reads one kind of file and writes another."""
    kinds = _kind(arguments.file), _kind(arguments.to)
    if kinds not in _CONVERSIONS:
        allowed = ", ".join(f"{a} to {b}" for a, b in _CONVERSIONS)
        problem = f"from {kinds[0]} to {kinds[1]} (must be one of {allowed})"
        raise StateError("Cannot convert", [problem])
    state = _read(arguments.file, arguments.names)
    if kinds[1] == "torch":
        from ada2ms.torch import checkpoint

        checkpoint.write(state, arguments.to)
    else:
        state.save(arguments.to)
    print(f"{arguments.to}: {len(state.parameters)} parameters")
    _print_notes(state)
    return 0


def _print_notes(state: State) -> None:
    for note in state.notes:
        print(f"note        {note}")


def _read(file: Path, names: Path | None) -> State:
    kind = _kind(file)
    if kind == "state":
        return State.load(file)
    if kind == "keras":
        from ada2ms.tf import checkpoint as of_keras

        return of_keras.read(file)
    if kind == "JAX":
        from ada2ms.jax import checkpoint as of_jax

        return of_jax.read(file)
    from ada2ms.torch import checkpoint

    return checkpoint.read(file, _names(names))


def _names(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise StateError(f"Cannot read {str(file)!r}", [f"not JSON ({error})"]) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StateError(f"Cannot read {str(file)!r}", ["not a list of names"])
    return names


def _kind(file: Path) -> str:
    if file.is_dir():
        return "JAX"
    if file.suffix not in _KINDS:
        problem = f"its suffix must be one of {', '.join(_KINDS)}, or it must be a folder of Orbax"
        raise StateError(f"Cannot tell what {str(file)!r} is", [problem])
    return _KINDS[file.suffix]


def _unequal(what: str, left: Any, right: Any) -> list[str]:
    same = left == right or (left != left and right != right)  # NaN equals NaN here
    return [] if same else [f"{what}: {left} and {right}"]
