"""One run of a comparison, by the protocol."""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ada2ms.compare.data import Data, Split
from ada2ms.compare.optimizers import OPTIMIZERS
from ada2ms.compare.protocol import EVERY_TASK, Protocol, Record, Run
from ada2ms.demo.digits import shuffled

POINTS = 30  # of a curve


def train(run: Run, protocol: Protocol, data: Data, device: str = "cpu") -> Record:
    """Trains, evaluates and returns what is recorded: plain data.

    The record has `validation` (accuracy and loss; 0 and None if training diverged), `train_loss` (mean over the last
    tenth of the steps), `diverged`, `seconds`; and of a run of the stage "test" also `test`, and, unless the protocol
    wants none, the `curves` of training loss, root mean square of the parameters' change in a step, and adaptivity.
    """
    start = time.perf_counter()
    steps = protocol.steps[run.task]
    torch.manual_seed(run.seed)
    model = EVERY_TASK[run.task].model(data).to(device)
    optimizer = OPTIMIZERS[run.optimizer].make(_groups(model, run.decay), run.rate, steps)
    losses: list[float] = []
    curves: dict[str, list[float | None]] = {"step": [], "loss": [], "change": [], "adaptivity": []}
    drawn = protocol.curves and run.stage == "test"
    watched = {round((i + 1) * steps / POINTS) - 1 for i in range(POINTS)} if drawn else set()
    for step, (x, y) in enumerate(_batches(data, protocol.batch, steps, run.seed, device)):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * schedule(step, steps)
        optimizer.zero_grad()
        loss = _losses(model(x), y).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        before = [p.detach().clone() for p in model.parameters()] if step in watched else []
        optimizer.step()
        if step in watched:
            adaptivity = optimizer.param_groups[0].get("adaptivity")
            curves["step"].append(step + 1)
            curves["loss"].append(_plain(np.mean(losses[-max(1, steps // POINTS) :])))
            curves["change"].append(_plain(_change(before, model)))
            curves["adaptivity"].append(_plain(adaptivity(step) if callable(adaptivity) else adaptivity))
    diverged = not math.isfinite(losses[-1]) or not all(bool(p.isfinite().all()) for p in model.parameters())
    record: Record = {
        "validation": evaluate(model, data.validation, device, diverged),
        "train_loss": _plain(np.mean(losses[-max(1, steps // 10) :])),
        "diverged": diverged,
    }
    if run.stage == "test":
        record["test"] = evaluate(model, data.test, device, diverged)
    if drawn:
        record["curves"] = curves
    return {**record, "seconds": round(time.perf_counter() - start, 2)}


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step as a fraction of its peak: a linear warm-up, and half a cosine down to 0.01."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: str, diverged: bool = False) -> dict[str, float | None]:
    """Mean loss, and fraction of labels (of next characters) that are the most likely ones."""
    if diverged:
        return {"accuracy": 0.0, "loss": None}
    model.eval()
    total, right, count = 0.0, 0, 0
    for x, y in zip(*(torch.from_numpy(a).split(256) for a in split), strict=True):  # type: ignore[no-untyped-call]
        logits, y = model(x.to(device)), y.to(device)
        total += _losses(logits, y).sum().item()
        right += int((logits.argmax(-1) == y).sum().item())
        count += y.numel()
    return {"accuracy": right / count, "loss": _plain(total / count)}


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Decay is for the weights of convolutions, of linear layers and of embeddings of tokens."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (decayed if p.ndim > 1 and name != "positions" else rest).append(p)
    return [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def _batches(data: Data, size: int, steps: int, seed: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a new order each epoch, mirrored at random where the data allow it."""
    inputs, targets = (torch.from_numpy(a).to(device) for a in data.train)
    size = min(size, len(targets))
    rng = np.random.default_rng(seed)
    for indices in shuffled(len(targets), size, steps, rng):
        chosen = torch.from_numpy(indices).to(device)
        x = inputs[chosen]
        if data.flips:
            mirrored = torch.from_numpy(rng.random(size) < 0.5).to(device)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        yield x, targets[chosen]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")


def _change(before: list[Tensor], model: nn.Module) -> float:
    squares = sum(((p.detach() - q) ** 2).sum() for p, q in zip(model.parameters(), before, strict=True))
    return math.sqrt(float(squares) / sum(p.numel() for p in before))


def _plain(x: Any) -> float | None:
    """A number that JSON can hold, to six digits."""
    return float(f"{float(x):.6g}") if x is not None and math.isfinite(float(x)) else None
