"""What a recorder adds to a compiled step in JAX: no bit of the parameters, and little memory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax_support import squares_are_summed_at_once

from ada2ms.jax import Recorder, ada2ms, recorded
from support import slow

SHAPE = (160, 128)  # of arrays that are large enough that their order matters


def tree(seed: int, count: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for i in range(count)} | {"b": jnp.ones(5)}


def compiled(optimizer: Any, params: Any) -> Any:
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), params).compile()


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(0.1),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "scheduled": lambda: optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.1, 9), momentum=0.9),
    "sgd": lambda: optax.sgd(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "ada2ms": lambda: ada2ms(0.1),
}


@pytest.mark.parametrize("name", ["adamw", *slow(*(name for name in OPTIMIZERS if name != "adamw"))])
@pytest.mark.parametrize("full", [0, *slow(1)])
def test_large_parameters_are_the_same_to_the_last_bit(name: str, full: int, tmp_path: Path) -> None:
    results = []
    with Recorder(tmp_path / "run", tree(0), full=full) as recorder:
        for optimizer in (OPTIMIZERS[name](), recorded(OPTIMIZERS[name](), recorder)):
            params, step = tree(0), compiled(optimizer, tree(0))
            state = optimizer.init(params)
            for i in range(3):
                params, state = step(params, state, tree(i + 1))
            results.append((params, state))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(x, y)


@squares_are_summed_at_once
def test_no_further_model_is_held_in_memory(tmp_path: Path) -> None:
    """Neither all updates at once, nor a copy of parameters that are written over, nor squares."""
    params = tree(0, 8)
    with Recorder(tmp_path / "run", params, full=0) as recorder:
        program = compiled(recorded(optax.adamw(0.1), recorder), params)
    size = params["w0"].nbytes
    assert program.memory_analysis().temp_size_in_bytes < 2 * size
    assert f"f32[{SHAPE[0]},{SHAPE[1]}]{{1,0}} copy(" not in program.as_text()
