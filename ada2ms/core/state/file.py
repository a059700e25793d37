"""Files of states: safetensors, so that they can be read without running what they contain.

A state is plain data here: the fields of a `State`, with the fields of its parameters and groups as dictionaries.

Tensors are called `<slot>/<parameter>`, and `extra/<name>`; those of a receipt `receipt/<slot>/<parameter>`, of the
state that it starts from, and `gradient/<index of the step>/<parameter>`. The rest is JSON in the file's metadata,
floats as `float.hex()`:

    format           "ada2ms-state"
    format_version   of this layout; every version has its own reader, kept for good
    spec_version     of the rule, as in the golden vectors
    source           where the state comes from
    state            groups, scope, nonfinite, skipped, max_norm, compensated; and notes and a receipt, if there are any
    sha256           of all of the above and of the tensors, since safetensors itself keeps no checksum
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ada2ms._extras import require
from ada2ms.core.atomic import write_whole
from ada2ms.core.schedules import AdaptivitySchedule, from_dict
from ada2ms.core.spec import VERSION
from ada2ms.core.state.errors import StateError

Array = NDArray[Any]
Data = dict[str, Any]
FORMAT: Final = "ada2ms-state"
FORMAT_VERSION: Final = 2
TOO_WIDE: Final = ("float128", "longdouble", "complex256", "clongdouble")  # for the format
_ARRAYS: Final = ("param", "exp_avg", "exp_avg_sq", "compensation")  # of a parameter
_KEYS: Final = ("format", "format_version", "spec_version", "source", "state")


def save(state: Data, path: Path) -> None:
    """Writes a file, whole or not at all.

    Raises:
        ImportError: safetensors is not installed.
    """
    require("safetensors", "state")
    from safetensors.numpy import save as to_bytes

    content, tensors = _packed(state)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "spec_version": str(VERSION),
        "source": state["source"],
        "state": json.dumps(content),
    }
    metadata["sha256"] = _checksum(metadata, tensors)
    write_whole(path, lambda file: file.write(to_bytes(tensors, metadata)))


def load(path: Path) -> Data:
    """Reads and checks a file.

    Raises:
        FileNotFoundError: there is none.
        StateError: it is damaged, or not such a file.
        ImportError: safetensors is not installed.
    """
    require("safetensors", "state")
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
    except SafetensorError as error:
        raise StateError(f"Cannot read {str(path)!r}", [f"not a whole safetensors file ({error})"]) from None
    if metadata.get("format") != FORMAT:
        raise StateError(f"Cannot read {str(path)!r}", ["a safetensors file, but not a state of Ada2MS"])
    version = metadata.get("format_version", "")
    if version not in _READERS:
        readable = ", ".join(_READERS)
        raise StateError(f"Cannot read {str(path)!r}", [f"its format version is {version!r}; readable: {readable}"])
    if metadata.get("sha256") != _checksum(metadata, tensors):
        raise StateError(f"Cannot read {str(path)!r}", ["damaged: its checksum does not match"])
    return _READERS[version](metadata, tensors)


def _packed(state: Data) -> tuple[Data, dict[str, Array]]:
    """A state as JSON and tensors."""
    tensors: dict[str, Array] = {}
    for name, entry in state["parameters"].items():
        for slot in _ARRAYS:
            if entry[slot] is not None:
                tensors[f"{slot}/{name}"] = _as_reals(entry[slot])
        tensors[f"step/{name}"] = np.array(entry["step"], np.int64)
        if entry["global_exp_avg_sq"] is not None:
            tensors[f"global_exp_avg_sq/{name}"] = np.array(entry["global_exp_avg_sq"], np.float64)
    tensors |= {f"extra/{name}": _as_reals(array) for name, array in state["extras"].items()}
    content: Data = {
        "parameters": list(state["parameters"]),
        "complex": [name for name, entry in state["parameters"].items() if np.iscomplexobj(entry["exp_avg"])],
        "extras": list(state["extras"]),
        "complex_extras": [name for name, array in state["extras"].items() if np.iscomplexobj(array)],
        "groups": [_group_to_json(group) for group in state["groups"]],
        "scope": state["scope"],
        "nonfinite": state["nonfinite"],
        "skipped": state["skipped"],
        "max_norm": None if state["max_norm"] is None else float(state["max_norm"]).hex(),
        "compensated": bool(state["compensated"]),
    }
    if state["notes"]:  # readers from before there were notes ignore them
        content["notes"] = state["notes"]
    if state["receipt"] is not None:
        content["receipt"], own = _packed_receipt(state["receipt"])
        tensors |= own
    return content, tensors


def _packed_receipt(receipt: Data) -> tuple[Data, dict[str, Array]]:
    start, tensors = _packed(receipt["start"])
    tensors = {f"receipt/{name}": array for name, array in tensors.items()}
    steps = []
    for i, step in enumerate(receipt["steps"]):
        tensors |= {f"gradient/{i}/{name}": _as_reals(g) for name, g in step["gradients"].items()}
        lr = None if step["lr"] is None else step["lr"].hex()
        paired = [name for name, g in step["gradients"].items() if np.iscomplexobj(g)]
        steps.append({"gradients": list(step["gradients"]), "complex": paired, "batch": step["batch"], "lr": lr})
    return {"start": start, "source": receipt["start"]["source"], "steps": steps}, tensors


def _read_1(metadata: dict[str, str], tensors: dict[str, Array]) -> Data:
    content = json.loads(metadata["state"])
    parameters = {}
    for name in content["parameters"]:
        own = tensors.get(f"global_exp_avg_sq/{name}")
        paired = name in content["complex"]
        entry: Data = {slot: _array(tensors, f"{slot}/{name}", paired) for slot in ("param", "exp_avg", "exp_avg_sq")}
        entry["step"] = int(tensors[f"step/{name}"])
        entry["global_exp_avg_sq"] = None if own is None else float(own)
        parameters[name] = entry
    return {
        "parameters": parameters,
        "groups": [_group_from_json(group) for group in content["groups"]],
        "scope": content["scope"],
        "nonfinite": content["nonfinite"],
        "skipped": content["skipped"],
        "source": metadata["source"],
        "notes": content.get("notes", []),
    }


def _read_2(metadata: dict[str, str], tensors: dict[str, Array]) -> Data:
    """As the first, with the compensations of parameters, `max_norm`, `compensated`, and extras."""
    content, state = json.loads(metadata["state"]), _read_1(metadata, tensors)
    for name, entry in state["parameters"].items():
        entry["compensation"] = _array(tensors, f"compensation/{name}", name in content["complex"])
    state["max_norm"] = None if content["max_norm"] is None else float.fromhex(content["max_norm"])
    state["compensated"] = content["compensated"]
    paired = content["complex_extras"]
    state["extras"] = {name: _array(tensors, f"extra/{name}", name in paired) for name in content["extras"]}
    if (receipt := content.get("receipt")) is not None:
        state["receipt"] = _read_receipt(receipt, tensors)
    return state


def _read_receipt(receipt: Data, tensors: dict[str, Array]) -> Data:
    metadata = {"state": json.dumps(receipt["start"]), "source": receipt["source"]}
    prefix = "receipt/"
    own = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    steps = [
        {
            "gradients": {
                name: _array(tensors, f"gradient/{i}/{name}", name in step["complex"]) for name in step["gradients"]
            },
            "batch": step["batch"],
            "lr": None if step["lr"] is None else float.fromhex(step["lr"]),
        }
        for i, step in enumerate(receipt["steps"])
    ]
    return {"start": _read_2(metadata, own), "steps": steps}


# From a file's metadata and tensors to the state; a new version adds a reader, and the old ones stay.
_READERS: Final[dict[str, Callable[[dict[str, str], dict[str, Array]], Data]]] = {
    "1": _read_1,
    "2": _read_2,
}


def _array(tensors: dict[str, Array], name: str, paired: bool) -> Array | None:
    """A tensor by its name, None if there is none; pairs of reals along the last axis as complex numbers."""
    found = tensors.get(name)
    return found.view(np.result_type(found, np.complex64))[..., 0] if paired and found is not None else found


def _as_reals(array: Array) -> Array:
    """A complex array as pairs of reals along a new last axis; contiguous."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    return array[..., None].view(array.real.dtype) if np.iscomplexobj(array) else array


def _checksum(metadata: dict[str, str], tensors: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for key in _KEYS:
        digest.update(f"{key}\0{metadata.get(key)}\0".encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _group_to_json(group: Data) -> Data:
    s = group["global_exp_avg_sq"]
    hyper = {name: _to_json(value) for name, value in group["hyper"].items()}
    return {
        "params": group["params"],
        "hyper": hyper,
        "global_exp_avg_sq": None if s is None else s.hex(),
        "global_step": group["global_step"],
    }


def _group_from_json(group: Data) -> Data:
    s = group["global_exp_avg_sq"]
    hyper = {name: _from_json(value) for name, value in group["hyper"].items()}
    return {
        "params": group["params"],
        "hyper": hyper,
        "global_exp_avg_sq": None if s is None else float.fromhex(s),
        "global_step": group["global_step"],
    }


def _to_json(value: float | AdaptivitySchedule) -> Any:
    return value.to_dict() if isinstance(value, AdaptivitySchedule) else value.hex()


def _from_json(value: Any) -> float | AdaptivitySchedule:
    return from_dict(value) if isinstance(value, dict) else float.fromhex(value)
