"""`ada2ms state`: shows, compares and converts states without their models."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from state_support import FIXTURE, assert_equal, written

from ada2ms import core
from ada2ms.cli import main
from ada2ms.core import State

pytest.importorskip("safetensors", reason="safetensors is not installed")


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", "show", str(FIXTURE)]) == 0
    shown = capsys.readouterr().out
    for part in ("by hand", "skip, 2 steps skipped", "Linear(start=1.0", "dense.kernel  (3, 2)", "step 7", "k 6"):
        assert part in shown


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.safetensors"
    state = written()
    state.save(file)
    assert main(["state", "diff", str(FIXTURE), str(file)]) == 0
    assert capsys.readouterr().out == "equal\n"
    state.parameters["dense.kernel"].exp_avg[0, 0] += 1
    state.parameters["dense.bias"].step += 1
    state.groups[0].hyper["lr"] = 0.2
    del state.parameters["wave"]
    state.groups[0].params.remove("wave")
    state.save(file)
    assert main(["state", "diff", str(FIXTURE), str(file)]) == 1
    shown = capsys.readouterr().out
    assert "dense.kernel: exp_avg differs by 1.000e+00" in shown
    assert "dense.bias: step: 5 and 6" in shown
    assert "wave: in the first only" in shown
    assert "'lr': 0.2" in shown
    assert len(shown.splitlines()) == 5


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint of torch's AdamW to a state and back, into an optimizer again: nothing is lost."""
    import torch

    from ada2ms.torch import Ada2MS, export_state

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    saved, neutral, back = tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "b.pth"
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, saved)
    assert main(["state", "convert", str(saved), str(neutral)]) == 0
    assert_equal(replace(State.load(neutral), source=""), replace(export_state(model, optimizer), source=""))
    assert main(["state", "convert", str(neutral), str(back)]) == 0
    assert main(["state", "diff", str(saved), str(back)]) == 0
    loaded = torch.load(back, weights_only=True)
    for kind in (torch.optim.AdamW, Ada2MS):
        other = kind(model.named_parameters(), lr=0.5)
        other.load_state_dict(loaded["optimizer"])
        assert other.param_groups[0]["lr"] == 0.1
        for p in model.parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(other.state[p][key], optimizer.state[p][key])

    # Ada2MS, with its own s; and an optimizer that was given no names
    ours = Ada2MS(model.parameters(), lr=0.1, adaptivity=core.Cosine(1, 0, 9))
    model(torch.ones(1, 3)).sum().backward()
    ours.step()
    torch.save(ours.state_dict(), saved)
    capsys.readouterr()
    assert main(["state", "convert", str(saved), str(neutral)]) == 2
    assert "does not name its parameters" in capsys.readouterr().err
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["weight", "bias"]))
    assert main(["state", "convert", str(saved), str(neutral), "--names", str(names)]) == 0
    state = State.load(neutral)
    assert state.groups[0].global_exp_avg_sq == float(ours.state[model.weight]["global_exp_avg_sq"])
    assert state.groups[0].hyper["adaptivity"] == core.Cosine(1, 0, 9)
    assert main(["state", "convert", str(neutral), str(back)]) == 0
    again = Ada2MS(model.parameters())
    again.load_state_dict(torch.load(back, weights_only=True)["optimizer"])
    assert again.param_groups[0]["adaptivity"] == core.Cosine(1, 0, 9)
    assert again.state[model.weight]["global_exp_avg_sq"] == ours.state[model.weight]["global_exp_avg_sq"]


def test_convert_keeps_what_the_whole_optimizer_has_and_what_is_beside_it(tmp_path: Path) -> None:
    """Clipping, compensations of 16 bits, running statistics and frozen values; no second copy of a tied weight."""
    import torch

    from ada2ms.torch import Ada2MS, export_state

    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3, bias=False), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3, bias=False)
    ).bfloat16()
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = Ada2MS(trained, lr=0.01, max_norm=0.5, compensated=True)
    for i in range(3):
        model(torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) + i).square().sum().backward()
        optimizer.step()
    saved, neutral, back = tmp_path / "a.pt", tmp_path / "a.safetensors", tmp_path / "b.pt"
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, saved)
    assert main(["state", "convert", str(saved), str(neutral)]) == 0
    state = State.load(neutral)
    beside = ["1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert sorted(state.extras) == beside
    assert (state.max_norm, state.compensated) == (0.5, True)
    assert any(entry.compensation.any() for entry in state.parameters.values())
    exported = export_state(model, optimizer, extras={name: name for name in state.extras})
    assert_equal(replace(state, source=""), replace(exported, source="", notes=[]))
    assert main(["state", "convert", str(neutral), str(back)]) == 0
    assert main(["state", "diff", str(saved), str(back)]) == 0
    loaded = torch.load(back, weights_only=True)
    again = Ada2MS(trained, lr=0.5, max_norm=0.5, compensated=True)
    again.load_state_dict(loaded["optimizer"])
    for _, p in trained:
        for key, x in optimizer.state[p].items():
            assert torch.equal(again.state[p][key], x), key
            assert again.state[p][key].dtype == x.dtype, key
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict({**loaded["model"], "2.weight": loaded["model"]["0.weight"]})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_checkpoints_of_torch_that_are_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in a sentence each; and decay that is part of Adam's gradient is not taken for the rule's."""
    import torch

    def converted(content: Any) -> tuple[int, str]:
        torch.save(content, tmp_path / "a.pt")
        status = main(["state", "convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")])
        return status, capsys.readouterr().err

    def trained(kind: Any, **options: Any) -> Any:
        optimizer = kind(model.named_parameters(), **options)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer.state_dict()

    model = torch.nn.Linear(3, 2)
    for content, message in (
        ([1], "its keys are []"),
        ({"optimizer": {"state": {}, "param_groups": [{}]}}, "without betas"),
        ({"optimizer": {"state": [], "param_groups": 3}}, "without betas"),
        ({"optimizer": trained(torch.optim.SGD, momentum=0.9), "model": model.state_dict()}, "without betas"),
        (trained(torch.optim.AdamW, amsgrad=True), "'bias' has ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step']"),
        (trained(torch.optim.Adamax), "'bias' has ['exp_avg', 'exp_inf', 'step']"),
        (torch.optim.AdamW(model.named_parameters()).state_dict(), "nothing is known of 'bias'"),
        ({"optimizer_states": [trained(torch.optim.AdamW)] * 2}, "no state dict of one optimizer"),
    ):
        assert converted(content)[0] == 2
        assert message in converted(content)[1]
        assert not (tmp_path / "a.safetensors").exists()
    lightning = {"optimizer_states": [trained(torch.optim.AdamW, weight_decay=0.1)], "state_dict": model.state_dict()}
    assert converted(lightning) == (0, "")
    state = State.load(tmp_path / "a.safetensors")
    assert state.groups[0].hyper["weight_decay"] == 0.1
    assert np.array_equal(state.parameters["weight"].param, model.weight.detach().numpy())
    adam = trained(torch.optim.Adam, weight_decay=0.1)
    if "decoupled_weight_decay" in adam["param_groups"][0]:  # since torch 2.7
        assert converted(adam) == (0, "")
        assert "weight_decay" not in State.load(tmp_path / "a.safetensors").groups[0].hyper


def test_a_checkpoint_of_torch_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    (tmp_path / "a.pt").write_text("old")
    with pytest.raises(ZeroDivisionError):
        main(["state", "convert", str(FIXTURE), str(tmp_path / "a.pt")])
    assert (tmp_path / "a.pt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.keras
def test_convert_from_keras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `model.save` wrote is what `export_state` would have given, to a state or to torch."""
    import keras

    from ada2ms.tf import Ada2MS, export_state, plain_layers

    saved, neutral, torch_file = (str(tmp_path / f"a.{suffix}") for suffix in ("keras", "safetensors", "pt"))
    x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.LayerNormalization()])
    model.save(saved)
    assert main(["state", "convert", saved, neutral]) == 2
    assert "it has no optimizer" in capsys.readouterr().err
    for optimizer in (Ada2MS(2.0**-7, adaptivity=core.Linear(1, 0, 9)), keras.optimizers.AdamW(2.0**-7)):
        model.compile(optimizer=optimizer, loss="mse")
        model.fit(x, y, epochs=2, verbose=0)
        model.save(saved)
        assert main(["state", "convert", saved, neutral]) == 0
        assert_equal(State.load(neutral), export_state(model, optimizer, **plain_layers(model)))
        assert main(["state", "convert", saved, torch_file]) == 0
        assert main(["state", "diff", saved, torch_file]) == 0
    Path(saved).write_text("not a checkpoint")
    assert main(["state", "show", saved]) == 2
    assert "keras.saving.load_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.safetensors"], "There is no file"),
        (["show", "a.txt"], "suffix must be"),
        (["show", "bad.pt"], "torch.load(weights_only=True): UnpicklingError: "),
        (["show", "other.pt"], "its keys are ['weight']"),
        (["show", "sgd.pt", "--names", "names.json"], "not JSON"),
        (["convert", "a.safetensors", "b.safetensors"], "from state to state"),
        (["convert", "a.safetensors", "b.keras"], "from state to keras"),
        (["convert", "none.keras", "b.pt"], "There is no file 'none.keras'"),
        (["diff", "a.safetensors", "none.pt"], "none.pt"),
    ],
)
def test_commands_that_cannot_be_done(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    written().save("a.safetensors")
    Path("bad.pt").write_bytes(b"not a checkpoint")
    Path("names.json").write_text("[")
    torch.save({"weight": torch.zeros(2)}, "other.pt")
    torch.save({"state": {}, "param_groups": []}, "sgd.pt")
    before = {file: Path(file).read_bytes() for file in os.listdir()}
    assert main(["state", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert {file: Path(file).read_bytes() for file in os.listdir()} == before
