"""Verdicts on two traces and on one: what is earned, what cannot be told, and what the command line says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trace_training
from trace_faults import adamw, faulty, other, trace

from ada2ms.cli import main
from ada2ms.core.dialects import KNOWN, Dialect, replay
from ada2ms.core.trace import Trace, diff, judge
from ada2ms.core.trace.explain import explain
from ada2ms.core.trace.pair import Pair, grain
from ada2ms.core.trace.pair import _is_scaled as is_scaled

LR, DECAY = trace_training.LR, trace_training.DECAY
WITHIN = {"data": {"within": True}}


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 60},
        {"dtype": "bfloat16"},
        {"autocast": True},
        {"dtype": "float64"},
        {"full": 0},
        {"optimizer": other("Adafactor")},
        {"optimizer": other("SGD", momentum=0.9, weight_decay=0.1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_runs_without_a_fault_differ_by_rounding_only(options: dict[str, Any], seed: int) -> None:
    """The samples of each batch are summed in another order."""
    found = diff(trace("torch", {**options, "seed": seed}), trace("torch", {**options, "seed": seed, **WITHIN}))
    assert found.outcome == "only rounding", found
    assert "batches hold the same samples in another order" in found.notes


def test_a_repeat_says_how_far_rounding_goes() -> None:
    a, b, repeat = trace("torch", {}), trace("torch", {"gradient_noise": 3e-5}), trace("torch", WITHIN)
    noisy = trace("torch", {"gradient_noise": 1e-5})
    assert diff(a, b).outcome == "parted"
    assert diff(a, b, repeat).outcome == "parted"
    found = diff(a, b, noisy)
    assert found.outcome == "only rounding", found
    assert "a repeat of A differs by" in str(found)
    assert any("equal to A in every bit" in note for note in diff(a, repeat, trace("torch", {})).notes)


def test_precision_that_both_runs_have_is_seen_in_the_numbers() -> None:
    a, b = trace("torch", {"autocast": True}), trace("torch", {"autocast": True, **WITHIN})
    assert Pair(a, b).yardstick.name == "bfloat16"
    assert Pair(a, trace("torch", {})).yardstick.name == "float32"
    assert Pair(trace("torch", {}), trace("torch", WITHIN)).yardstick.name == "float32"
    assert grain(1.5) == 2.0**-8
    assert grain(float(np.float32(0.1))) == 2.0**-24
    assert grain(0.1) == 2.0**-53


def test_numbers_of_16_bits_are_seen_behind_one_factor_and_nowhere_else() -> None:
    """As clipping leaves them; in no gradient of float32, nor where it is of whole numbers."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    for shape, factor in (((4, 8), 0.123), ((64, 33), 1e-5), ((3, 3, 2, 16), 7.7)):
        x = rng.normal(size=shape) * np.exp(rng.normal(size=shape))
        for dtype, digits in ((ml_dtypes.bfloat16, 8), (np.float16, 11)):
            narrow = x.astype(dtype).astype(np.float32)
            scaled = narrow * np.float32(factor)
            assert is_scaled(scaled, digits)
            assert is_scaled(narrow * np.float32(0.3) * np.float32(factor), digits), "two roundings"
            scaled.flat[x.size // 2 - 1] *= np.float32(1.0003)
            assert not is_scaled(scaled, digits), "but for one of them"
            assert not is_scaled(np.concatenate([scaled, 1.01 * scaled]).astype(np.float32), digits)
            assert not is_scaled((scaled * (1 + 1e-5 * rng.normal(size=shape))).astype(np.float32), digits)
    for seed in range(200):
        gradient = np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)
        assert not is_scaled(gradient, 8)
        assert not is_scaled(gradient * np.float32(0.1), 11)
    pixels = np.arange(1, 101, dtype=np.float32)
    assert not is_scaled(np.outer(pixels, [0.3, 0.7]).astype(np.float32), 8), "of two outputs"
    assert not is_scaled(pixels[:, None] * np.float32(0.3), 8), "of one output"
    assert not is_scaled((rng.integers(0, 9, (20, 20)) * np.float32(0.3)).astype(np.float32), 8), "counts"


def test_autocast_behind_clipping_is_seen_and_named() -> None:
    clipped, cast = trace("torch", {"clip": 0.5}), trace("torch", {"clip": 0.5, "autocast": True})
    assert Pair(cast, cast).yardstick.name == "bfloat16"
    assert Pair(clipped, clipped).yardstick.name == Pair(clipped, cast).yardstick.name == "float32"
    found = diff(clipped, cast)
    assert (found.kind, found.stage) == ("precision", "forward"), found
    assert found.cause.startswith("B computes in bfloat16")


def test_features_in_another_order_are_the_first_thing_to_look_at() -> None:
    """Where the forward pass parts; by themselves they may be another layout."""
    found = diff(trace("torch", {}), trace("torch", {"data": {"features": -1}}))
    assert (found.stage, found.kind) == ("forward", "everything"), found
    assert found.look[0].startswith("the order of numbers within samples"), found


def renamed(given: Trace, **names: str) -> Trace:
    return replace(given, parameters=[replace(p, name=names.get(p.name, p.name + "x")) for p in given.parameters])


def test_what_cannot_be_told_is_said() -> None:
    a, b = trace("torch", {}), trace("torch", WITHIN)
    found = diff(a, renamed(b))
    assert (found.outcome, found.status) == ("cannot tell", 2)
    assert "'0.weight': '0.dense.kernel'" in str(found), "no mapping is proposed"
    assert diff(replace(a, steps=[]), b).outcome == "cannot tell"
    assert judge(replace(a, about={**a.about, "started": True})).status == 2
    assert judge(trace("torch", {"full": 0})).status == 2
    assert judge(trace("torch", {"optimizer": other("Adafactor")})).status == 2
    some = diff(a, replace(b, parameters=[replace(p, name=f"x{i}") if i else p for i, p in enumerate(b.parameters)]))
    assert any("not compared: '0.dense.bias' is only in A" in note for note in some.notes)


def test_growth_from_rounding_alone_cannot_be_told_without_a_repeat() -> None:
    """A pair of runs that drift apart tenfold in every step."""
    a = trace("torch", {"full": 0})
    steps = []
    for i, step in enumerate(a.steps):
        sketches = {what: x.copy() for what, x in step.sketches.items()}
        noise = np.random.default_rng(i).normal(size=sketches["gradient"].shape)
        sketches["gradient"] += np.minimum(1e-7 * 10.0**i, 0.5) * noise * sketches["gradient"][:, :1]
        steps.append(replace(step, sketches=sketches, loss=None))
    found = diff(a, replace(a, steps=steps))
    assert (found.outcome, found.status) == ("cannot tell", 2), found
    assert any("--repeat" in sentence for sentence in found.look)


JUDGED: list[tuple[Callable[[Any], Any], str, str]] = [
    (adamw(), "only rounding", "decoupled weight decay"),
    (other("Adam", weight_decay=DECAY), "only rounding", "weight decay in the gradient"),
    (other("SGD", momentum=0.9, nesterov=True, weight_decay=0.1), "only rounding", "Nesterov"),
    (other("Ada2MS", adaptivity=0.3), "only rounding", "Ada2MS"),
    (other("After"), "parted", "weight decay: decoupled, before the update against decoupled, after the update"),
    (other("Uncorrected"), "parted", "bias correction: of both moments against none"),
]


@pytest.mark.parametrize(("optimizer", "outcome", "words"), JUDGED)
def test_one_run_is_judged_alone(optimizer: Any, outcome: str, words: str) -> None:
    found = judge(trace("torch", {"optimizer": optimizer}))
    assert found.outcome == outcome, found
    assert words in str(found)


def test_a_learning_rate_that_is_not_used_is_seen() -> None:
    def weakened(params: Any) -> Any:
        import torch

        class AdamW(faulty("")):  # type: ignore[misc]
            def step(self, closure: Any = None) -> None:
                told = self.param_groups[0]["lr"]
                self.param_groups[0]["lr"] = told * (0.9 if self.state and self.count >= 2 else 1.0)
                super().step()
                self.count = getattr(self, "count", 0) + 1
                self.param_groups[0]["lr"] = told

            count = 0

        AdamW.__module__ = "torch.optim"
        assert issubclass(AdamW, torch.optim.Optimizer)
        return AdamW(params, lr=LR, weight_decay=DECAY)

    found = judge(trace("torch", {"optimizer": weakened}))
    assert (found.outcome, found.step) == ("parted", 3), found
    assert "from step 3 on the updates are 0.9 of the rule's" in found.cause


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD", "ada2ms"])
def test_the_catalogue_replays_what_the_frameworks_do(name: str) -> None:
    """In float64, to the last digits; so with every step's own value, and a gradient that is missing once."""
    import torch

    from ada2ms.torch import Ada2MS

    rng = np.random.default_rng(0)
    p = torch.nn.Parameter(torch.from_numpy(rng.normal(size=7)))
    kind = name.rpartition(".")[2]
    hyper = {"lr": 0.1, "weight_decay": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-3, "momentum": 0.8, "adaptivity": 0.4}
    made: dict[str, Callable[[], Any]] = {
        "AdamW": lambda: torch.optim.AdamW([p], lr=0.1, weight_decay=0.1, eps=1e-3),
        "Adam": lambda: torch.optim.Adam([p], lr=0.1, weight_decay=0.1, eps=1e-3),
        "SGD": lambda: torch.optim.SGD([p], lr=0.1, weight_decay=0.1, momentum=0.8),
        "ada2ms": lambda: Ada2MS([p], lr=0.1, weight_decay=0.1, eps=1e-3, adaptivity=0.4),
    }
    optimizer = made[kind]()
    values, gradients, updates = [], [], []
    for i in range(5):
        g = None if i == 2 else rng.normal(size=7)
        p.grad = None if g is None else torch.from_numpy(g)
        values.append(p.detach().numpy().copy())
        gradients.append(g)
        optimizer.step()
        updates.append(p.detach().numpy() - values[-1])
    means = [0.0 if g is None else float(np.mean(g * g)) for g in gradients]
    for (direction, rest), update, k in zip(
        replay(KNOWN[name], values, gradients, [hyper] * 5, means), updates, range(5), strict=True
    ):
        assert np.allclose(0.1 * direction + rest, update, rtol=1e-9, atol=1e-12), k


def test_a_dialect_is_found_with_two_things_changed() -> None:
    def wrong(params: Any) -> Any:
        import torch

        return torch.optim.Adam(params, lr=LR, weight_decay=0.1, eps=1e-3)

    found = explain(trace("torch", {"optimizer": wrong}), prefer=Dialect(changed=(("eps", 1e-8),)))
    assert found is not None
    assert found.fits
    assert (found.dialect.decay, dict(found.dialect.changed)["eps"]) == ("coupled", 1e-3)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (str(tmp_path / name) for name in "abc")
    for path, options in ((a, {}), (b, WITHIN), (c, {"reduction": "sum"})):
        trace_training.train_torch(Path(path), **options)
    assert main(["trace", "diff", a, b]) == 0
    assert capsys.readouterr().out.startswith("Only rounding: in 8 steps")
    picture = tmp_path / "picture.png"
    assert main(["trace", "diff", a, c, "--json", "--repeat", b, "--picture", str(picture)]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["stage"], said["kind"], said["step"], said["status"]) == ("forward", "reduction", 1, 1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["trace", "judge", a]) == 0
    assert "torch.optim.AdamW's updates in 3 steps are those of Adam" in capsys.readouterr().out
    assert main(["trace", "show", a]) == 0
    shown = capsys.readouterr().out
    assert "2.dense.kernel" in shown
    assert "1.48868" in shown
    assert main(["trace", "show", a, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 8
    assert main(["trace", "diff", a, str(tmp_path / "none")]) == 2
    assert "There is no file" in capsys.readouterr().err
    Path(c).write_bytes(Path(c).read_bytes()[:500] + b"x" + Path(c).read_bytes()[501:])
    assert main(["trace", "judge", c]) == 2
    assert "damaged" in capsys.readouterr().err


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_example_finds_both_mistakes(tmp_path: Path) -> None:
    """With the sentences that the docs quote."""
    command = [sys.executable, "-W", "error", "examples/trace_port.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third = [part.splitlines()[1] for part in done.stdout.split("$ ")[1:]]
    docs = (ROOT / "docs" / "trace.md").read_text()
    assert all(sentence in docs for sentence in (first, second, third))
    assert "another reduction" in first
    assert "weight_decay: 0.01 against 0.0001" in second
    assert third.startswith("Only rounding")


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    command = [sys.executable, "benchmarks/torch_trace.py", "--smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps more") == 2
