"""Sums for sketches on a CPU by C++, which the compiled program calls and which reads every entry once."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ada2ms.core.trace import Parameter, native
from ada2ms.core.trace.sketch import WIDTH, codes

_SOURCE: Final = Path(__file__).with_suffix(".cpp")
_TARGET: Final = "ada2ms_sketch_sums"
_REALS: Final = {"complex64": "float32", "complex128": "float64"}
_WORD: Final = np.uint32  # two are a number of float64, which programs have only where it is switched on


def is_available(trees: Iterable[Mapping[str, Any]]) -> bool:
    """Whether arrays, by name, are to be summed here: those of a model that is large enough, all on one CPU."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return False
    kinds = [[jax.typeof(x) for x in arrays.values()] for arrays in trees]
    known = all(_real(kind.dtype) in native.DTYPES for each in kinds for kind in each)
    return known and max(sum(kind.size for kind in each) for each in kinds) >= native.ENTRIES and _is_registered()


def sums(arrays: Mapping[str, Any], parameters: Sequence[Parameter]) -> jax.Array:
    """Squares and signed sums of arrays of which parameters are, or are parts; as `sketches.sums`.

    Returns:
        (parameters, WIDTH, 2), of which `unpacked` makes float64.
    """
    present = [i for i, p in enumerate(parameters) if p.own in arrays]
    given = [parameters[i].of(arrays[parameters[i].own], jnp) for i in present]
    known, places = _coded(given, [parameters[i].axes for i in present])
    kind = jax.ShapeDtypeStruct((len(present), WIDTH, 2), _WORD)  # type: ignore[no-untyped-call]
    call = jax.ffi.ffi_call(_TARGET, kind, vmap_method="sequential")
    found: jax.Array = call(known, *given, places=places, threads=np.int64(native.cores()))
    if len(present) == len(parameters):
        return found
    missing = np.full((len(parameters), WIDTH), np.nan).view(_WORD).reshape(-1, WIDTH, 2)
    return jnp.asarray(missing).at[np.array(present, int)].set(found)


def unpacked(sums: Any) -> NDArray[Any]:
    """Sums, of here or of `sketches`, as float64."""
    found: NDArray[Any] = np.asarray(sums)
    return found.view(np.float64)[..., 0] if found.dtype == _WORD else found.astype(np.float64)


def _coded(arrays: Sequence[Any], axes: Sequence[tuple[int, ...] | None]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The codes of all arrays one after the other, those of a kind once; and where those of each are, and its type."""
    found: dict[Any, tuple[int, ...]] = {}
    every, places, end = [np.zeros(0, np.uint8)], [], 0
    for x, order in zip(arrays, axes, strict=True):
        key = x.shape, order, bool(jnp.iscomplexobj(x))
        if key not in found:
            rows, columns = codes(x.shape, order, is_complex=key[2])
            found[key] = end, end + len(rows), len(rows), len(columns)
            every += [rows, columns]
            end += len(rows) + len(columns)
        places.append((*found[key], native.DTYPES.index(_real(x.dtype))))
    return np.concatenate(every), np.array(places, np.int64).reshape(-1)


def _real(dtype: Any) -> str:
    """The type of an array's entries by name; of complex ones that of their parts."""
    name = str(jnp.dtype(dtype).name)
    return _REALS.get(name, name)


@functools.cache
def _is_registered() -> bool:
    """Whether XLA has the sums, which are compiled if need be."""
    headers = Path(jax.ffi.include_dir())
    included = [native.SOURCE, *sorted(headers.rglob("*.h"))]
    found = native.built(_SOURCE, included, [native.SOURCE.parent, headers])
    if found is not None:
        function = jax.ffi.pycapsule(found.ada2ms_sketch_sums)  # type: ignore[no-untyped-call]
        jax.ffi.register_ffi_target(_TARGET, function, platform="cpu")
    return found is not None
