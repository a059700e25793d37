"""Traces of JAX where a process may use one processor alone: no array of a program is waited for by its only thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to processors"),
]

SCRIPT = """
import os, sys
if sys.argv[2] == "bound":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
else:
    os.environ["NPROC"] = "1"
import jax, jax.numpy as jnp, numpy as np, optax
from ada2ms.core.trace import Trace
from ada2ms.core.trace.model import fingerprint
from ada2ms.jax import Recorder, recorded

params = {f"w{i}": jnp.eye(512) / 2 for i in range(2)}
batches = np.random.default_rng(0).normal(size=(4, 1024, 512)).astype(np.float32)
with Recorder(sys.argv[1], params, full=2) as recorder:
    optimizer = recorded(optax.adamw(1e-3), recorder)

    def loss_of(params, x):
        for name, w in params.items():
            x = jnp.tanh(x @ w)
            recorder.output(name, x)
        return jnp.mean(x**2)

    @jax.jit
    def step(params, state, x):
        recorder.batch(x)
        loss, gradients = jax.value_and_grad(loss_of)(params, x)
        updates, state = optimizer.update(gradients, state, params)
        recorder.loss(loss)
        return optax.apply_updates(params, updates), state

    state, first = optimizer.init(params), params
    for x in batches:
        params, state = step(params, state, x)
steps = Trace.load(sys.argv[1]).steps
for i, (x, found) in enumerate(zip(batches, steps, strict=True)):
    np.testing.assert_allclose(found.batches[0][0], fingerprint(x), rtol=1e-5)
    assert [each.name for each in found.outputs] == (["w0", "w1"] if i < 2 else []), i
x = batches[0]
for output, w in zip(steps[0].outputs, first.values()):
    x = np.tanh(x @ np.asarray(w))
    np.testing.assert_allclose(output.arrays[0].norm, np.linalg.norm(x), rtol=1e-5)
kept = steps[0].full["value"]["w0"]  # 65536 entries of 262144
np.testing.assert_array_equal(kept, np.asarray(first["w0"]).reshape(-1)[np.arange(65536) * 4])
"""


@pytest.mark.parametrize("how", ["bound", "told"])
def test_large_arrays_reach_the_host(how: str, tmp_path: Path) -> None:
    """Batches, outputs and entries, each larger than what JAX hands over without another thread."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), how]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True, timeout=120)
