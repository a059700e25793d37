"""The types in which a step computes and stores, and complex leaves as pairs of reals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def compute_dtype(*arrays: Any) -> Any:
    """The type that arrays are computed in together: at least float32, complex if one of them is."""
    # Alone first, since float32 beside a weakly typed float64, such as `jnp.array(0.1)`, would make float32 of it.
    return _common(jnp.float32, _common(*arrays))


def real_dtype(*arrays: Any) -> Any:
    """`compute_dtype` of their real and imaginary parts."""
    return jnp.finfo(compute_dtype(*arrays)).dtype  # type: ignore[no-untyped-call]


def update_dtype(*arrays: Any) -> Any:
    """The type of an update of a parameter and its gradient; float32 for integers, of which an update is a fraction."""
    dtype = _common(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else compute_dtype(dtype)


def as_array(x: Any, dtype: Any) -> jax.Array:
    """An array as it is; a Python number, as which scalars come back from JSON or msgpack, in `dtype`."""
    if isinstance(x, jax.Array):
        return x
    return jnp.asarray(x) if hasattr(x, "dtype") else jnp.asarray(x, dtype)


def cast(value: Any, dtype: Any) -> Any:
    """A hyperparameter that does not widen arrays of `dtype`; Python numbers never do."""
    return value.astype(dtype) if isinstance(value, jax.Array) else value


def zeros_like(p: Any, dtype: Any) -> jax.Array:
    """Zeros like a parameter, in `dtype`; a complex one in a real `dtype` becomes pairs along a new leading axis."""
    dtype = compute_dtype(p) if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    zeros = jnp.zeros_like(p, dtype=dtype)
    if is_complex(p) and not jnp.iscomplexobj(zeros):
        return jnp.stack([zeros, zeros])
    return zeros


def numpy(x: Any) -> Any:
    """A copy as an array of NumPy; 16 bits as float32."""
    array = np.array(x)
    return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


def is_complex(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.complexfloating))


def is_compensated(x: Any) -> bool:
    """Whether `compensated` keeps what the rounding of a parameter loses: those of 16 bits."""
    return jnp.result_type(x) in (jnp.bfloat16, jnp.float16)


def to_reals(x: jax.Array, pairs: bool) -> jax.Array:
    """A complex leaf, or its state, as pairs of reals along a new leading axis."""
    return jnp.stack([x.real, x.imag]) if pairs and jnp.iscomplexobj(x) else x.real


def from_reals(x: jax.Array, pairs: bool, dtype: Any = None) -> jax.Array:
    """The reverse of `to_reals`, stored in `dtype`."""
    if pairs and (dtype is None or jnp.issubdtype(dtype, jnp.complexfloating)):
        x = jax.lax.complex(x[0], x[1])
    return x if dtype is None else x.astype(dtype)


def _common(*arrays: Any) -> Any:
    """The type that several promote to. JAX promotes none of 8 bits or fewer; bfloat16 holds all of their values."""
    wide = [x for x in arrays if not _is_narrow_float(x)]
    narrow = {jnp.result_type(x) for x in arrays if _is_narrow_float(x)}
    if len(narrow) == 1 and not wide:
        return narrow.pop()
    # Promotion is intended here, also where the user has forbidden implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(wide or [jnp.float32]))
        return jnp.result_type(dtype, jnp.bfloat16) if narrow else dtype


def _is_narrow_float(x: Any) -> bool:
    dtype = jnp.result_type(x)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 16  # type: ignore[no-untyped-call]
