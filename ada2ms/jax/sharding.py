"""Axes of `jax.shard_map`, and what varies along them."""

from typing import Any

import jax


def axes_of(axis_name: Any) -> tuple[Any, ...]:
    """The axes that an `axis_name` names, as a tuple."""
    return () if axis_name is None else tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def check_axes(axis_name: Any) -> None:
    """Raises unless JAX keeps account, here, of what varies along each axis."""
    for axis in axes_of(axis_name):
        if not _accounted(axis):
            raise ValueError(
                f"Invalid axis_name: {axis_name!r} (must be axes of a jax.shard_map with check_vma=True: elsewhere a "
                "leaf does not tell whether it is sharded; under jax.jit alone, no axis_name is needed)"
            )


def axis_size(axes: tuple[str, ...]) -> int:
    """The number of devices along axes of `jax.shard_map`."""
    size: int = jax.lax.psum(1, axes)  # type: ignore[no-untyped-call]
    return size


def varying(x: jax.Array) -> frozenset[str]:
    """The axes of `jax.shard_map` over which its shards differ; none where JAX keeps no account of that."""
    aval: Any = jax.typeof(x)
    axes: frozenset[str] = aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # older and newer JAX
    return axes


def _accounted(axis: str) -> bool:
    try:
        return axis in varying(jax.lax.axis_index(axis))  # type: ignore[no-untyped-call]
    except NameError:  # no such axis here
        return False
