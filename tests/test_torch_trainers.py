"""Ada2MS in the trainers of others, where their own AdamW says what must come out."""

import argparse
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ada2ms.core import Cosine
from ada2ms.torch import Ada2MS

pytestmark = pytest.mark.slow


class Network(nn.Module):
    """Returns its loss by name, as Hugging Face's Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": 10 * (self.layers(x) - labels).square().mean()}


def data(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)
    return [{"x": one, "labels": other} for one, other in zip(x, labels, strict=True)]


def trained(folder: Path, max_grad_norm: float, **options: Any) -> Any:
    """Hugging Face's Trainer after 12 updates of two batches each, with weight decay and a schedule."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        max_grad_norm=max_grad_norm,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = options.pop("model", None) or Network()
    trainer = transformers.Trainer(model, arguments, train_dataset=data(), **options)
    trainer.train()
    return trainer


def difference(one: Any, other: Any) -> float:
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


MAX_NORM = 14.1  # some gradients are above, and some below
ONE: dict[str, Any] = {"lr": 1e-2, "adaptivity": 1.0, "max_norm": MAX_NORM}


def test_hugging_faces_trainer_as_with_adamw(tmp_path: Path) -> None:
    """As its AdamW with its clipping, but for the 1e-6 that torch's clipping adds, and rounding in float32."""
    ours = trained(tmp_path, 0.0, optimizer_cls_and_kwargs=(Ada2MS, ONE)).model
    theirs = trained(tmp_path, MAX_NORM).model
    assert difference(ours, Network()) > 0.03
    assert difference(ours, theirs) < 2e-6
    unclipped = trained(tmp_path, 0.0).model
    assert difference(unclipped, theirs) > 1e-4


def test_hugging_faces_trainer_is_handed_the_optimizer(tmp_path: Path) -> None:
    """Of its own groups: the same numbers as when the Trainer makes it."""
    whole = trained(tmp_path, 0.0, optimizer_cls_and_kwargs=(Ada2MS, ONE))
    model = Network()
    by_name = dict(model.named_parameters())
    decayed = {name for name, p in by_name.items() if p.ndim > 1}
    groups = [
        {"params": [p for name, p in by_name.items() if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in by_name.items() if name not in decayed], "weight_decay": 0.0},
    ]
    handed = trained(tmp_path, 0.0, model=model, optimizers=(Ada2MS(groups, **ONE), None))
    assert [len(group["params"]) for group in whole.optimizer.param_groups] == [2, 4]
    assert difference(whole.model, handed.model) == 0


def test_hugging_faces_trainer_takes_no_partial(tmp_path: Path) -> None:
    """It takes it for a factory that is given a model, as docs/trainers.md says."""
    with pytest.raises(TypeError):
        trained(tmp_path, 0.0, optimizer_cls_and_kwargs=(functools.partial(Ada2MS, adaptivity=1.0), {"lr": 1e-2}))


def parser() -> Any:
    """With an optimizer chosen by name, as the Lightning CLI has it where the model makes its groups."""
    jsonargparse = pytest.importorskip("jsonargparse")
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--optimizer", type=Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer])
    return made


CHOSEN = "--optimizer=ada2ms.torch.Ada2MS"
SCHEDULE = '{"class_path": "ada2ms.core.Cosine", "init_args": {"start": 1.0, "end": 0.5, "steps": 20}}'
PARTS = ["=ada2ms.core.Cosine", ".start=1", ".end=0.5", ".steps=20"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["adaptivity=0.75", "betas=[0.8,0.9]"], {"adaptivity": 0.75, "betas": (0.8, 0.9)}),
        ([f"adaptivity={SCHEDULE}"], {"adaptivity": Cosine(1.0, 0.5, 20)}),
        ([f"adaptivity{part}" for part in PARTS], {"adaptivity": Cosine(1.0, 0.5, 20)}),
        (["max_norm=1", "scope=tensor", "nonfinite=skip"], {"max_norm": 1.0, "scope": "tensor", "nonfinite": "skip"}),
        (["fused=false", "compensated=true"], {"fused": False, "compensated": True}),
    ],
)
def test_a_command_line_makes_it_by_name(options: list[str], expected: dict[str, Any]) -> None:
    """And so does the configuration that is written of it."""
    command = parser()
    given = command.parse_args([CHOSEN, *(f"--optimizer.{option}" for option in options)])
    for found in (given, command.parse_string(command.dump(given))):
        optimizer = command.instantiate(found).optimizer([torch.zeros(2, requires_grad=True)])
        assert isinstance(optimizer, Ada2MS)
        assert {name: optimizer.param_groups[0][name] for name in expected} == expected


@pytest.mark.parametrize("wrong", ["adaptivity=much", "scope=layer", "compensated=3", "lr=fast"])
def test_a_command_line_knows_the_types(wrong: str) -> None:
    """It refuses what is of none, before a model is made."""
    name, _, value = wrong.partition("=")
    with pytest.raises(argparse.ArgumentError, match=rf"(?s){name}.*{value}"):
        parser().parse_args([CHOSEN, f"--optimizer.{wrong}"])
