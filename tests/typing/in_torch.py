"""A user's script as type checkers see it, in PyTorch. Nothing here is run."""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

from ada2ms.core import NO_DECAY, Cosine, Group, Receipt, State
from ada2ms.core.state import Report
from ada2ms.torch import (
    Ada2MS,
    Recorder,
    arguments,
    export_gradients,
    export_state,
    import_state,
    measure,
    param_groups,
    plain_layers,
)

model = nn.Linear(3, 1)
optimizer: torch.optim.Optimizer = Ada2MS(model.parameters())
own = Ada2MS(
    [{"params": model.parameters(), "lr": 1e-3}],
    lr=torch.tensor(1e-3),
    betas=(0.9, 0.999),
    weight_decay=0.1,
    adaptivity=Cosine(1.0, 0.0, steps=10),
    scope="tensor",
    nonfinite="skip",
    max_norm=1.0,
    compensated=True,
    fused=True,
)
assert_type(own, Ada2MS)
Ada2MS(model.named_parameters(), adaptivity=lambda count: 1.0 / (1.0 + float(count)))
groups = param_groups(model, [Group("weight", lr_scale=0.1), NO_DECAY], lr=1e-3, betas=(0.9, 0.99))
assert_type(groups, list[dict[str, Any]])
Ada2MS(groups, lr=1e-3)
assert_type(own.step(), None)
assert_type(own.step(lambda: 1.0), float)
assert_type(own.grad_norm, Tensor | None)
assert_type(own.state_dict(), dict[str, Any])
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(own, T_max=10)

state = export_state(model, own, **plain_layers(model))
assert_type(state, State)
report = import_state(model, own, state, **plain_layers(model), verify=3)
assert_type(report, Report)
assert_type(arguments(state), dict[str, Any])
receipt = Receipt(state)
receipt.add(export_gradients(model, own), lr=0.1)
with Recorder("run.trace", model, own, **plain_layers(model)) as recorder:
    assert_type(recorder, Recorder)
    recorder.batch(torch.ones(3))
    recorder.loss(torch.ones(()))

assert_type(measure(own, model, wait=True), dict[str, float])
assert_type(measure(own), dict[str, float | Tensor])

# What is wrong is found.
Ada2MS(model.parameters(), lr="fast")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Ada2MS(model.parameters(), scope="global")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Ada2MS(model.parameters(), amsgrad=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
