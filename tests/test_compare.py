"""The optimizer comparison: its protocol is what it says, no run is lost, and its baselines are right."""

import csv
import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare_support import finish
from filelock import FileLock

from ada2ms.cli import main
from ada2ms.compare import data, report, runner
from ada2ms.compare.adamnx import AdamNX
from ada2ms.compare.optimizers import ADAPTIVITIES, CANDIDATES, at
from ada2ms.compare.protocol import SMOKE, TASKS, TUNING_SEED, Protocol, Run
from ada2ms.compare.train import _batches, _groups, evaluate, schedule, train
from ada2ms.core import Linear

RESULTS = Path(__file__).parents[1] / "docs" / "comparison"
TINY = replace(SMOKE, tasks=("digits, ResNet-20",), optimizers=("AdamW", "SGD", "Ada2MS 0.5"))


def record(accuracy: float, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {"validation": {"accuracy": accuracy, "loss": loss}, "train_loss": 0.1, "diverged": False, **more}


def test_every_optimizer_is_tuned_and_tested_by_as_many_runs() -> None:
    protocol = Protocol()
    records = finish(protocol, lambda run: 0.5)
    assert len(records) == protocol.total()
    counts: dict[tuple[str, str], list[str]] = {}
    for r in records.values():
        counts.setdefault((r["run"]["task"], r["run"]["optimizer"]), []).append(r["run"]["stage"])
    assert len(counts) == len(protocol.tasks) * len(CANDIDATES)
    assert all(sorted(stages) == ["decay"] * 2 + ["rate"] * 7 + ["test"] * 5 for stages in counts.values())


def test_grids_are_equally_wide_and_seeds_of_the_search_are_not_tested() -> None:
    protocol = Protocol()
    records = finish(protocol, lambda run: 0.5)
    for name, candidate in CANDIDATES.items():
        rates = [run.rate for run in protocol.chosen("glyphs, ViT", name, records) if run.stage == "rate"]
        np.testing.assert_allclose(np.log10(np.array(rates) / candidate.rate), np.arange(-1.5, 2, 0.5), atol=2e-3)
    assert all((r["run"]["seed"] == TUNING_SEED) == (r["run"]["stage"] != "test") for r in records.values())


def test_the_best_of_the_validation_split_is_tested() -> None:
    protocol = replace(Protocol(), tasks=("glyphs, ViT",), optimizers=("AdamW",))
    wanted = {("rate", 9.49e-3, 0.1): 0.8, ("decay", 9.49e-3, 1.0): 0.9}
    records = finish(protocol, lambda run: wanted.get((run.stage, run.rate, run.decay), 0.1))
    tested = {(r["run"]["rate"], r["run"]["decay"]) for r in records.values() if r["run"]["stage"] == "test"}
    assert tested == {(9.49e-3, 1.0)}


def test_among_equals_the_lowest_loss_is_best_and_divergence_is_worst() -> None:
    protocol = replace(Protocol(), tasks=("glyphs, ViT",), optimizers=("AdamW",), decays=(1.0,))
    runs = protocol.pending({})
    losses = [None, 0.3, 0.2, 0.4, None, None, 0.5]
    records = {run.key: record(0.5, loss) for run, loss in zip(runs, losses, strict=True)}
    assert {run.rate for run in protocol.pending(records)} == {runs[2].rate}


def test_a_run_repeats_and_only_a_test_run_sees_the_test_split() -> None:
    digits = data.load_digits(0.1)
    unseen = replace(digits, test=(np.zeros(0), np.zeros(0)))  # to look at it would be an error
    run = Run("rate", "digits, ResNet-20", "Ada2MS linear", 3e-3, 0.1, 0)
    first, again = (train(run, SMOKE, unseen) for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert "test" not in first
    tested = train(replace(run, stage="test"), SMOKE, digits)
    assert 0 <= tested["test"]["accuracy"] <= 1
    assert {k: len(v) for k, v in tested["curves"].items()} == dict.fromkeys(tested["curves"], 2)
    assert tested["curves"]["adaptivity"] == [1.0, 0.5]


def test_a_run_that_diverges_is_recorded_as_the_worst() -> None:
    run = Run("test", "digits, ResNet-20", "SGD", 1e30, 0.1, 1)
    found = train(run, replace(SMOKE, steps={run.task: 20}), data.load_digits(0.1))
    assert found["diverged"]
    assert found["validation"] == found["test"] == {"accuracy": 0.0, "loss": None}
    json.dumps(found, allow_nan=False)


def test_weights_and_batches_of_a_seed_are_the_same_for_all() -> None:
    digits = data.load_digits()
    batches = [[y.numpy() for _, y in _batches(digits, 64, 20, seed, "cpu")] for seed in (1, 1, 2)]
    assert np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    epoch = [x.numpy() for x, _ in _batches(digits, 64, 17, 1, "cpu")]
    assert len(np.unique(np.concatenate(epoch).reshape(-1, 64), axis=0)) == 17 * 64  # each image at most once an epoch


def test_images_are_mirrored_only_where_that_does_no_harm() -> None:
    x = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4).repeat(64, 0)
    split = x, np.zeros(64, np.int64)
    for flips in (False, True):
        (found, _), *_ = _batches(data.Data(split, split, split, 1, flips), 64, 1, 0, "cpu")
        mirrored = (found.numpy()[:, 0, 0, 0] == 3).sum()
        assert (15 < mirrored < 49) if flips else mirrored == 0
        assert np.array_equal(np.sort(found.numpy(), axis=3), x)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert int(np.argmax(rates)) == 9
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.data != "CIFAR"])
def test_decay_is_for_weights_alone(task: str) -> None:
    model = TASKS[task].model(data.LOADERS[TASKS[task].data](0.02))
    decayed, rest = (group["params"] for group in _groups(model, 0.1))
    assert len(decayed) + len(rest) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in decayed)
    assert sum(p.ndim > 1 for p in rest) == ("former" in task or "ViT" in task)  # embeddings of positions


def test_evaluation() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    model = torch.nn.Embedding(3, 2, _weight=logits)
    found = evaluate(model, (np.arange(3), np.array([0, 1, 0])), "cpu")
    assert found["accuracy"] == pytest.approx(2 / 3)
    expected = np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(3))])
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_transitions_end_with_the_run() -> None:
    assert at("linear", 100) == Linear(1, 0, 100)
    for name in ("linear", "cosine", "exponential"):
        adaptivity: Any = at(name, 100)
        assert adaptivity(0) == 1
        assert adaptivity(100) == pytest.approx(1 / 16 if name == "exponential" else 0)
    assert {at(a, 100) for a in ADAPTIVITIES[:3]} == {0.25, 0.5, 0.75}


def test_adamnx() -> None:
    """Its first moment is Adam's, bias correction included, by Adam's own recurrence; its second one is written out."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=5), rng.normal(size=(50, 5))
    lr, b1, b2, eps, decay = 1e-2, 0.9, 0.99, 1e-8, 0.1
    p = torch.tensor(start, requires_grad=True)
    optimizer = AdamNX([p], lr, (b1, b2), eps, decay)
    theta, m, v = start.copy(), np.zeros(5), np.zeros(5)
    for t, g in enumerate(gradients, start=1):
        p.grad = torch.tensor(g)
        optimizer.step()
        m = b1 * m + (1 - b1) * g
        weight = (b2 ** ((1 - b2) * (t - 1)) - b2 ** ((1 - b2) * t)) / (1 - b2 ** ((1 - b2) * t))  # 1 - c2
        v += weight * (g**2 - v)
        theta = theta - lr * decay * theta - lr * (m / (1 - b1**t)) / (np.sqrt(v) + eps)
        np.testing.assert_allclose(p.detach().numpy(), theta, rtol=1e-11)


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_descends(name: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.randn(64, 1)
    model = torch.nn.Linear(3, 1)
    optimizer = CANDIDATES[name].make([{"params": list(model.parameters()), "weight_decay": 0.0}], 1e-2, 30)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_glyphs_are_made_the_same_each_time_and_each_of_every_kind() -> None:
    (images, labels), (again, same) = data.draw_glyphs(2, seed=0), data.draw_glyphs(2, seed=0)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, same)
    assert np.array_equal(np.bincount(labels), [2] * 34)
    assert not np.array_equal(images, data.draw_glyphs(2, seed=1)[0])


def test_text_is_followed_by_what_follows() -> None:
    text = data.load_text(0.05)
    x, y = text.train
    assert np.array_equal(x[:, 1:], y[:, :-1])
    assert np.array_equal(x[1:, 0], y[:-1, -1])
    assert x.max() < text.classes


def write_cifar(folder: Path, layout: str, rng: np.random.Generator) -> None:
    """A small CIFAR in the layout of the real one, pickled as that is, by byte strings."""
    (folder / layout).mkdir(parents=True)
    hundred = layout == "cifar-100-python"
    files = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for file in files:
        labels = rng.integers(100 if hundred else 10, size=20).tolist()
        batch = {b"data": rng.integers(256, size=(20, 3072), dtype=np.uint8), b"batch_label": b"made up"}
        batch |= {b"fine_labels": labels, b"coarse_labels": labels} if hundred else {b"labels": labels}
        (folder / layout / file).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.mark.parametrize(
    ("layout", "classes", "sizes"), [("cifar-10-batches-py", 10, 90), ("cifar-100-python", 100, 18)]
)
def test_cifar(layout: str, classes: int, sizes: int, tmp_path: Path) -> None:
    write_cifar(tmp_path, layout, np.random.default_rng(0))
    found = data.load_cifar(tmp_path)
    assert (found.classes, found.flips, len(found.train[1]), len(found.test[1])) == (classes, True, sizes, 20)
    assert found.train[0].shape == (sizes, 3, 32, 32)
    assert np.allclose(found.train[0].mean((0, 2, 3)), 0, atol=1e-4)
    raw = pickle.loads((tmp_path / layout / ("train" if classes == 100 else "data_batch_1")).read_bytes())
    picture = raw[b"data"][3].reshape(3, 32, 32)
    assert np.corrcoef(picture[1].ravel(), found.train[0][3, 1].ravel())[0, 1] == pytest.approx(1)
    again = data.load_cifar(tmp_path / layout)
    assert np.array_equal(found.test[0], again.test[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-100-python"])
def test_a_comparison_on_cifar(layout: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, layout, np.random.default_rng(0))
    out = tmp_path / "out"
    options = ["--smoke", "--cifar", str(tmp_path), "--tasks", "cifar, conv", "--optimizers", "adamw", "--workers", "1"]
    assert main(["compare", *options, "--out", str(out)]) == 0
    assert "CIFAR, ConvNeXt" in (out / "table.md").read_text()


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": Trap(), b"labels": []}),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
        b"",
        b"<html>",
    ],
)
def test_what_is_not_cifar_is_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    assert main(["compare", "--cifar", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "data_batch_1' as a file of CIFAR" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["nope", "cuda:99"])
def test_no_device(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--device", device, "--out", str(tmp_path / "out")]) == 2
    assert f"Invalid device: {device!r} (" in capsys.readouterr().err


def test_no_cifar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--cifar", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "it must hold cifar-10-batches-py or cifar-100-python" in capsys.readouterr().err
    assert main(["compare", "--tasks", "CIFAR", "--out", str(tmp_path / "out")]) == 2
    assert "--cifar FOLDER" in capsys.readouterr().err


def lines(folder: Path) -> list[str]:
    file = folder / "runs.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    """All of `--smoke`, every task and optimizer, in two attempts."""
    command = [sys.executable, "-m", "ada2ms", "compare", "--smoke", "--workers", "2"]
    command += ["--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(lines(tmp_path)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while is_running(process.pid):  # the workers of the killed process end too
        assert time.monotonic() < end
        time.sleep(0.05)
    before = lines(tmp_path)
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"run": {"stage": "ra')  # as a power cut may leave it
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = lines(tmp_path)
    assert after[: len(before)] == before
    keys = [Run(**json.loads(line)["run"]).key for line in after]
    assert len(keys) == len(set(keys)) == SMOKE.total()


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compare", "--out", str(tmp_path), "--tasks", "digits", "--optimizers", "SGD", "--workers", "1"]
    assert main([*options, "--smoke"]) == 0
    first = lines(tmp_path)
    assert main([*options, "--smoke"]) == 0
    assert lines(tmp_path) == first
    assert main(options) == 2  # another protocol
    assert "holds another comparison: its rates, decays, seeds, batch, steps, share differ" in capsys.readouterr().err
    for picture in ("rates", "losses", "adaptivity", "changes"):
        assert (tmp_path / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"digits, ResNet-20"}
    assert {row["optimizer"] for row in rows} == {"SGD"}


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(runner.CompareError, match="Another comparison is running"):
        runner.compare(TINY, tmp_path)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "mnist"], "Invalid tasks: 'mnist' (must be or begin one of: digits, ResNet-20;"),
        (["--optimizers", "lion"], "Invalid optimizers: 'lion'"),
        (["--report"], "Nothing is finished"),
    ],
)
def test_bad_arguments(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_differences_are_seed_by_seed() -> None:
    protocol = replace(Protocol(), tasks=("glyphs, ViT", "glyphs, ConvNeXt"), optimizers=("Ada2MS 0.5", "Ada2MS 0.25"))
    gain = {"glyphs, ViT": 0.02, "glyphs, ConvNeXt": -0.01}
    records = finish(protocol, lambda run: run.seed / 10 + gain[run.task] * run.seed * (run.optimizer == "Ada2MS 0.25"))
    found = report.differences(protocol, records, "Ada2MS 0.25", protocol.tasks)
    np.testing.assert_allclose(found, [0.005, 0.01, 0.015, 0.02, 0.025])
    low, high = report.interval(found, 0.95)
    assert (low, high) == pytest.approx((0.015 - 2.776 * 0.00353553, 0.015 + 2.776 * 0.00353553), rel=1e-3)


def test_the_page_shows_the_records() -> None:
    """What docs/comparison holds is what its records give."""
    plan = json.loads((RESULTS / "plan.json").read_text())["protocol"]
    protocol = replace(Protocol(), seeds=tuple(plan["seeds"]))
    assert plan == json.loads(json.dumps(protocol.as_data()))
    records = runner.load(RESULTS)
    chosen = [run.key for task in protocol.tasks for name in CANDIDATES for run in protocol.chosen(task, name, records)]
    assert sorted(records) == sorted(chosen)
    assert len(records) == protocol.total()
    rows = [row for task in protocol.tasks for row in report.task_rows(protocol, records, task)]
    assert (RESULTS / "table.md").read_text() == report.markdown(protocol, records, rows)
    page = RESULTS.with_suffix(".md").read_text()
    for row in rows:
        assert f"{100 * row['test']:.1f} ± {100 * row['spread']:.1f}" in page
