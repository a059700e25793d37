"""The demo, as its users see it: what it prints, what it saves, and when it fails."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms import core
from ada2ms.cli import adaptivity, main
from ada2ms.core import State
from ada2ms.demo import digits, run, vit
from ada2ms.demo.vit_on_torch import ModelTrainer

# The demo's networks are trained on every Keras backend by test_trajectories.py; what prints them does not differ.
ONCE = pytest.mark.keras if os.environ["KERAS_BACKEND"] == "tensorflow" else pytest.mark.slow


@pytest.mark.keras
@ONCE
def test_all_frameworks_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "5", "--out", str(tmp_path), "--json", "--adaptivity", "cosine:1:0:4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["framework"] for f in found["frameworks"]] == ["torch", "tf", "jax"]
    assert found["steps"] == 5
    assert found["parted"] == []
    assert len(found["from_each_other"]) == 5
    losses = np.array([f["losses"] for f in found["frameworks"]])
    assert np.ptp(losses, axis=0).max() < 1e-4
    assert np.all(losses[:, -1] < losses[:, 0])
    assert 0 < max(found["from_each_other"]) <= found["bounds"]["from_each_other"]
    others = [f["largest_deviation_from_others"] for f in found["frameworks"]]
    assert max(others) == pytest.approx(max(found["from_each_other"]), rel=1e-3)  # whichever of two it is relative to
    assert min(others) > 0
    assert (tmp_path / "trajectories.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.keras
@ONCE
@pytest.mark.slow
@pytest.mark.parametrize("backends", [("jax",), ("torch", "tensorflow", "jax")])
def test_backends_of_keras_are_chosen_by_name(
    backends: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of them this process has."""
    options = ["--steps", "3", "--out", str(tmp_path), "--json", "--frameworks", "torch", "tf"]
    assert main(["demo", *options, "--keras-backends", *backends, backends[0]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["framework"] for f in found["frameworks"]] == ["torch", *["tf"] * len(backends)]
    assert [f["title"].split(" on ")[1] for f in found["frameworks"][1:]] == list(backends)
    losses = np.array([f["losses"] for f in found["frameworks"]])
    assert losses.shape == (1 + len(backends), 3)
    assert np.ptp(losses, axis=0).max() < 1e-4
    assert 0 < max(found["from_each_other"]) <= found["bounds"]["from_each_other"]


def test_a_missing_backend_that_was_asked_for_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "tensorflow")
    assert main(["demo", "--out", str(tmp_path), "--keras-backends", "jax", "tensorflow"]) == 2
    assert "tf: tensorflow not installed (pip install tensorflow)" in " ".join(capsys.readouterr().out.split())
    assert main(["demo", "--out", str(tmp_path), "--frameworks", "torch", "--keras-backends", "jax"]) == 2
    assert capsys.readouterr().err == "Invalid keras-backends: 'jax' (tf must be among the frameworks)\n"
    assert not list(tmp_path.iterdir())


def test_trajectories_that_part_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import ada2ms.torch

    class Other(torch.optim.AdamW):
        def __init__(self, params: Any, lr: float, adaptivity: float) -> None:
            super().__init__(params, lr)

    monkeypatch.setattr(ada2ms.torch, "Ada2MS", Other)
    assert main(["demo", "--steps", "3", "--out", str(tmp_path), "--frameworks", "torch", "jax"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Beyond the bound: PyTorch {torch.__version__} parts from the NumPy rule: step 1" in shown
    assert "Beyond the bound: the frameworks part from each other: step 1" in shown


def test_a_nan_is_beyond_every_bound() -> None:
    """In whichever tensor, step and framework; for all of which the largest deviation is taken."""
    weights = [np.ones(2), np.ones(2)]
    steps = [weights, [np.ones(2), np.array([1, np.nan])]]
    assert run.deviation(weights, steps[1]) == run.deviation(steps[1], weights) == np.inf
    other = run.Run("jax", "JAX", [1.0] * 2, [weights] * 2, [0.0] * 2, 1.0, 0.0, [1])
    strange = run.Run("torch", "PyTorch", [1.0] * 2, steps, [0.0, float("nan")], 1.0, 0.0, [1])
    for runs in permutations((other, other, strange)):
        assert run.parted(list(runs)) == [
            "PyTorch parts from the NumPy rule: step 2, deviation nan, bound 2.9e-06",
            "the frameworks part from each other: step 2, deviation inf, bound 6.1e-05",
        ]


def without_the_convnet(monkeypatch: pytest.MonkeyPatch) -> None:
    one = run.Run("torch", "PyTorch", [1.0], [[np.ones(2)]], [0.0], 1.0, 0.0, [1])
    monkeypatch.setattr(run, "train", lambda *_: one)


@pytest.mark.keras
@ONCE
def test_a_transformer_is_handed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From torch to JAX in test_handoff.py, and between every two frameworks in test_handoff_published.py."""
    without_the_convnet(monkeypatch)
    assert main(["demo", "--steps", "1", "--out", str(tmp_path), "--frameworks", "torch", "tf", "--handoff"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A Vision Transformer, handed over in mid-run" in shown
    assert re.search(r"PyTorch \S+ 1-5 \S+ \S+ 0.0e\+00 Keras \S+ on \w+ 6-10 \S+ \S+ \d\.\de-0[67] PyTorch", shown)
    assert "Beyond the bound" not in shown


def lost(slot: str) -> Callable[[State], State]:
    """A hand-over that does not bring a moment."""

    def change(state: State) -> State:
        entries = {name: replace(e, **{slot: getattr(e, slot) * 0}) for name, e in state.parameters.items()}
        return replace(state, parameters=entries)

    return change


def exchanged(state: State) -> State:
    """A hand-over that takes the query for the key, and back."""
    other = {"query": "key", "key": "query"}
    names = [re.sub("(query|key)(?=[.]kernel)", lambda found: other[found[0]], name) for name in state.parameters]
    entries = {name: state.parameters[source] for name, source in zip(state.parameters, names, strict=True)}
    return replace(state, parameters=entries)


def turned(state: State) -> State:
    """A hand-over that takes heads for features where attention ends."""
    entries = {
        name: replace(e, param=e.param.swapaxes(0, 1)) if name.endswith("out.kernel") and e.param is not None else e
        for name, e in state.parameters.items()
    }
    return replace(state, parameters=entries)


def without_the_global_moment(state: State) -> State:
    return replace(state, groups=[replace(group, global_exp_avg_sq=0.0) for group in state.groups])


@pytest.mark.parametrize(
    "fault",
    [lost("exp_avg"), lost("exp_avg_sq"), without_the_global_moment, exchanged, turned],
    ids=["exp_avg", "exp_avg_sq", "global_exp_avg_sq", "query and key", "heads and features"],
)
def test_a_transformer_that_is_handed_over_wrongly_parts(
    fault: Callable[[State], State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much farther than roundings, from the first step on."""
    right = ModelTrainer.import_state
    monkeypatch.setattr(
        ModelTrainer,
        "import_state",
        lambda self, state: right(self, fault(state) if state.groups[0].global_step else state),
    )
    segments = vit.hand_over(["torch"], 0, 0.5)
    (sentence,) = vit.parted(segments)
    assert sentence.startswith(f"the transformer that was handed over to {segments[1].title} parts")
    assert "step 6, " in sentence
    assert segments[1].deviations[0] > 1000 * run.mutual_bound(6)


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    real = run.find_spec
    monkeypatch.setattr(run, "find_spec", lambda name: None if name in modules else real(name))


def test_a_missing_framework_is_named_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "keras", "torch")
    assert main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not installed: torch: torch not installed (pip install 'ada2ms[torch]')" in shown
    assert "Not installed: tf: keras not installed (pip install 'ada2ms[tf]')" in shown
    assert "JAX" in shown


def test_a_missing_framework_that_was_asked_for_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "optax")
    assert main(["demo", "--out", str(tmp_path), "--frameworks", "torch", "jax"]) == 2
    assert "jax: optax not installed (pip install 'ada2ms[jax]')" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_without_any_framework(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "torch", "tensorflow", "jax")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "Keras has no backend (install one of tensorflow, jax, torch)" in shown
    assert shown.count("Not installed:") == 3


def test_without_flax_the_transformer_stays_out_of_jax(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit, "find_spec", lambda name: None if name == "flax" else run.find_spec(name))
    assert vit.installed(["torch", "tf", "jax"]) == ["torch", "tf"]
    without_the_convnet(monkeypatch)
    assert main(["demo", "--steps", "1", "--out", str(tmp_path), "--frameworks", "jax", "--handoff"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The same network, weights and batches in every framework" in shown
    assert "Without the Vision Transformer in jax: flax not installed (pip install flax)" in shown
    assert "A Vision Transformer" not in shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.25", 0.25),
        ("linear:1:0:200", core.Linear(1, 0, 200)),
        ("exponential:1:0.5:30", core.Exponential(1, 0.5, 30)),
    ],
)
def test_adaptivity(text: str, value: object) -> None:
    assert adaptivity(text) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adaptivity", "1.5"], "Invalid adaptivity: '1.5'"),
        (["--adaptivity", "2"], "Invalid adaptivity: '2' (adaptivity must be a number in [0, 1]"),
        (["--adaptivity", "half"], "Invalid adaptivity: 'half' (must be a number in [0, 1], or one of constant, "),
        (["--adaptivity", "linear:1:0"], "must be linear:start:end:steps"),
        (["--adaptivity", "square:1:0"], "one of constant, linear, cosine, exponential"),
        (["--adaptivity", "linear:1:0:1.5"], "Invalid adaptivity: 'linear:1:0:1.5'"),
        (["--seed", "-1"], "Invalid seed: '-1' (must be a whole number, at least 0)"),
        (["--steps", "0"], "Invalid steps: '0' (must be a whole number above 0)"),
        (["--frameworks", "mxnet"], "invalid choice: 'mxnet'"),
        (["--keras-backends", "numpy"], "invalid choice: 'numpy'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_an_error_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("has trained"))
    assert main(["demo", "--out", str(tmp_path / "file"), "--frameworks", "torch"]) == 2
    assert "Invalid out: " in capsys.readouterr().err


def test_an_interrupted_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert main(["demo", "--out", str(tmp_path), "--frameworks", "torch"]) == 130
    assert capsys.readouterr().err == "Stopped\n"


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ada2ms", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ada2ms ")


def test_batches_cover_the_data_and_repeat_with_the_seed() -> None:
    data = digits.load()
    first = list(data.batches(22, seed=1))  # one epoch of 1437 images, in batches of 64
    again = list(data.batches(22, seed=1))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    seen = np.concatenate([images for images, _ in first]).reshape(-1, 64)
    assert len(seen) == 22 * 64
    assert len(np.unique(seen, axis=0)) == len(seen)
