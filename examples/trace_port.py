"""A port of a PyTorch script to JAX whose curve is different: two recordings and one comparison say why.

    python examples/trace_port.py [FOLDER]

The port has two mistakes, each in one line. The script records the original, the port, the port with the first mistake
mended, and the port with both mended, and compares each port with the original: what the command
`ada2ms trace diff original.trace port.trace` prints.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

from ada2ms.core.trace import Trace, diff
from ada2ms.jax import Recorder as JaxRecorder
from ada2ms.jax import recorded
from ada2ms.torch import Recorder, plain_layers

STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 30, 32, 20, 64, 5
LR, DECAY = 1e-2, 1e-2


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(INPUTS, CLASSES))
    inputs = [rng.normal(size=(BATCH, INPUTS)).astype(np.float32) for _ in range(STEPS)]
    return [(x, np.argmax(x @ teacher, axis=1)) for x in inputs]


def original(path: Path) -> dict[str, np.ndarray]:
    """The script in PyTorch; returns the weights that it started from, for the port."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    with Recorder(path, model, optimizer, **plain_layers(model)) as recorder:
        for x, y in batches():
            recorder.batch(x, y)
            loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
            recorder.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return start


def port(path: Path, start: dict[str, np.ndarray], *, mean: bool, decay: bool) -> None:
    """The port to JAX. `mean` and `decay` mend the two mistakes."""
    params = {
        "0": {"dense": {"kernel": jnp.asarray(start["0.weight"].T), "bias": jnp.asarray(start["0.bias"])}},
        "1": {"dense": {"kernel": jnp.asarray(start["2.weight"].T), "bias": jnp.asarray(start["2.bias"])}},
    }

    def loss_of(params: Any, x: Any, y: Any) -> Any:
        first, last = params["0"]["dense"], params["1"]["dense"]
        logits = jnp.tanh(x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean() if mean else losses.sum()  # the first mistake

    made = optax.adamw(LR, weight_decay=DECAY) if decay else optax.adamw(LR)  # the second: Optax' default is another
    with JaxRecorder(path, params, names=lambda own: own.replace("/", "."), optimizer="optax.adamw") as recorder:
        optimizer = recorded(made, recorder)
        state = optimizer.init(params)

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        for x, y in batches():
            recorder.batch(x, y)
            params, state, loss = step(params, state, x, y)
            recorder.loss(loss)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    start = original(folder / "original.trace")
    for name, mended in (("port", (False, False)), ("port-2", (True, False)), ("port-3", (True, True))):
        port(folder / f"{name}.trace", start, mean=mended[0], decay=mended[1])
        print(f"$ ada2ms trace diff original.trace {name}.trace")
        print(diff(Trace.load(folder / "original.trace"), Trace.load(folder / f"{name}.trace")))
        print()


if __name__ == "__main__":
    main()
