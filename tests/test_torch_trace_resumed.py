"""Runs that are stopped and go on from a checkpoint: what their two traces are together, beside a run that was not."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ada2ms.cli import main
from ada2ms.core.trace import Trace, TraceError, diff, resumed
from ada2ms.torch import Recorder
from support import slow

STEPS, CHECKPOINT, STOP = 14, 8, 10  # of the whole run; when state is saved; when a run is stopped


class Run:
    """A network, its optimizer and a schedule; what is saved of them, and the step that comes."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], rate: Callable[[int], float]) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*self.layers())
        self.optimizer = optimizer(self.net.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.step = 0

    @staticmethod
    def layers() -> list[nn.Module]:
        return [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)]

    @property
    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}

    def saved(self) -> dict[str, Any]:
        return copy.deepcopy({name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step})

    def train(self, path: Path, until: int, checkpoint: int = -1, **options: Any) -> dict[str, Any]:
        """Until a step is done; gives what is saved at the checkpoint."""
        saved = self.saved()
        with Recorder(path, self.net, self.optimizer, **options) as recorder:
            while self.step < until:
                generator = torch.Generator().manual_seed(self.step)
                x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
                recorder.batch(x, y)
                loss = (self.net(x) - y).square().mean()
                recorder.loss(loss)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.step += 1
                if self.step == checkpoint:
                    saved = self.saved()
        return saved


def falling(step: int) -> float:
    """By what the learning rate is multiplied."""
    return 0.9**step


def traces(
    folder: Path,
    without: str = "",
    optimizer: Any = torch.optim.AdamW,
    stop: int = STOP,
    checkpoint: int = CHECKPOINT,
    rate: Callable[[int], float] = falling,
) -> list[Trace]:
    """A whole run; one that is stopped; and the rest of it from the checkpoint, of which something is not restored."""
    Run(optimizer, rate).train(folder / "a", STEPS)
    saved = Run(optimizer, rate).train(folder / "b", stop, checkpoint)
    rest = Run(optimizer, rate)
    if without == "head":
        saved["net"]["2.weight"] = torch.ones(3, 16)
    if without == "statistics":
        saved["net"] |= {"1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)}
    if without == "moments":
        saved["optimizer"]["state"] = {}
    for name, part in rest.parts.items():
        if name != without:
            part.load_state_dict(saved[name])
    rest.step = 0 if without == "step" else saved["step"]
    rest.train(folder / "b2", STEPS)
    return [Trace.load(folder / name) for name in ("a", "b", "b2")]


@pytest.mark.parametrize("stop", [CHECKPOINT, *slow(STOP)])
def test_a_run_that_goes_on_rightly_is_the_run_itself(stop: int, tmp_path: Path) -> None:
    """Wherever it was stopped: what was done after the checkpoint is done again."""
    a, b, b2 = traces(tmp_path, stop=stop)
    whole = resumed(b, b2)
    assert [step.number for step in whole.steps] == [*range(1, STEPS + 1)]
    verdict = diff(a, whole)
    assert verdict.outcome == "only rounding"
    assert f"B goes on from a checkpoint with step {CHECKPOINT + 1}" in verdict.notes


FAULTS = {  # what is not restored, and the verdict
    "moments": ("update", CHECKPOINT + 1, "the update of B is that of an optimizer's first step"),
    "optimizer": ("hyperparameters", CHECKPOINT + 1, "lr is 0.00430467 in A and 0.01 in B"),
    "step": ("data", CHECKPOINT + 1, "the batch of B is that of its step 1 again, that of A is a new one"),
    "net": ("value", CHECKPOINT + 1, "between steps 8 and 9 something else than the optimizer changed values in B"),
    "schedule": ("hyperparameters", CHECKPOINT + 2, "lr is"),
}


@pytest.mark.parametrize("without", ["moments", *slow(*list(FAULTS)[1:])])
def test_what_is_not_restored_shows_where_the_run_goes_on(without: str, tmp_path: Path) -> None:
    a, b, b2 = traces(tmp_path, without, stop=CHECKPOINT)
    verdict = diff(a, resumed(b, b2))
    stage, step, words = FAULTS[without]
    assert (verdict.outcome, verdict.stage, verdict.step) == ("parted", stage, step), verdict
    assert words in verdict.cause
    if step == CHECKPOINT + 1:
        assert "what B's checkpoint has and what is restored from it" in verdict.look[0]


@pytest.mark.parametrize("checkpoint", [STOP, *slow(6, CHECKPOINT)])
def test_where_values_do_not_change_the_data_tell_where_it_goes_on(checkpoint: int, tmp_path: Path) -> None:
    a, b, b2 = traces(tmp_path, checkpoint=checkpoint, rate=lambda step: float(step < 5))
    whole = resumed(b, b2)
    assert whole.about["resumed"] == [checkpoint + 1]
    assert diff(a, whole).outcome == "only rounding"


@pytest.mark.parametrize("without", ["head", *slow("net")])
def test_values_that_were_not_restored_are_no_other_place(without: str, tmp_path: Path) -> None:
    """Though the run that was stopped had gone further than its checkpoint."""
    a, b, b2 = traces(tmp_path, without)
    verdict = diff(a, resumed(b, b2))
    assert (verdict.stage, verdict.step) == ("value", CHECKPOINT + 1), verdict


def test_moments_that_are_lost_in_the_first_steps_are_named(tmp_path: Path) -> None:
    a, b, b2 = traces(tmp_path, "moments", checkpoint=2)
    verdict = diff(a, resumed(b, b2))
    assert (verdict.stage, verdict.step) == ("update", 3), verdict
    assert verdict.cause.startswith("the update of B is that of an optimizer's first step")


def test_one_layer_shows_that_its_moments_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all entries of the update: sketches of two tensors do not tell it from that of moments which are there."""
    monkeypatch.setattr(Run, "layers", staticmethod(lambda: [nn.Linear(6, 3)]))
    a, b, b2 = traces(tmp_path, "moments")
    assert diff(a, resumed(b, b2)).cause.startswith("the update of B is that of an optimizer's first step")


def test_statistics_that_are_lost_point_to_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "layers", staticmethod(lambda: [nn.Linear(6, 3), nn.BatchNorm1d(3)]))
    a, b, b2 = traces(tmp_path, "statistics")
    found = diff(a, resumed(b, b2))
    assert (found.stage, found.step) == ("statistics", CHECKPOINT + 1), found
    assert "what B's checkpoint has and what is restored from it" in found.look[0]


def test_the_command_takes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces(tmp_path)
    a, b, b2 = (str(tmp_path / name) for name in ("a", "b", "b2"))
    assert main(["trace", "diff", a, b, "--then", b2]) == 0
    assert f"in {STEPS} steps" in capsys.readouterr().out
    Run(torch.optim.AdamW, falling).train(tmp_path / "c", 1, names={"0.weight": "other"})
    assert main(["trace", "diff", a, b, "--then", str(tmp_path / "c")]) == 2
    assert "has other parameters than" in capsys.readouterr().err


def test_a_rest_of_other_parameters_is_refused(tmp_path: Path) -> None:
    _, b, b2 = traces(tmp_path)
    b2.parameters = b2.parameters[1:]
    with pytest.raises(TraceError, match="has other parameters"):
        resumed(b, b2)


def test_traces_without_steps_are_no_places(tmp_path: Path) -> None:
    _, b, b2 = traces(tmp_path)
    empty = replace(b, steps=[])
    assert resumed(b, empty) is b
    with pytest.raises(TraceError, match="has no steps, so that where"):
        resumed(empty, b2)


def test_a_rest_from_an_earlier_checkpoint_takes_the_place_of_a_later_one(tmp_path: Path) -> None:
    a, b, b2 = traces(tmp_path)
    whole = resumed(resumed(b, replace(b2, steps=b2.steps[2:])), b2)
    assert whole.about["resumed"] == [CHECKPOINT + 1]
    assert diff(a, whole).outcome == "only rounding"
