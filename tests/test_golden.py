"""The golden vectors: what is shipped is what the oracle makes, and it tells the rule from wrong variants of it."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpmath
import mutants_added  # noqa: F401
import numpy as np
import pytest
from mutation import MUTANTS, Mutant, mutate, rejection, replay

import mutants  # noqa: F401  # these two fill MUTANTS
import support
from ada2ms.core import golden
from golden import build, maker, oracle
from golden.__main__ import main as make

CASES = {case.id: case for case in golden.load()}


# The files.


def test_shipped_vectors_are_those_that_the_oracle_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert make(["--check"]) == 0
    assert capsys.readouterr().out.startswith(f"{len(CASES)} golden cases")


def test_what_is_installed_can_be_checked_without_the_oracle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mpmath", None)
    assert golden.main(["--check"]) == 0
    assert capsys.readouterr().out == f"{len(CASES)} golden cases in 10 files, as SHA256SUMS lists them\n"
    files = damaged(turn_a_digit, resum=False)
    monkeypatch.setattr(golden, "shipped", lambda: files)
    monkeypatch.setattr(golden, "load", golden.load.__wrapped__)
    assert golden.main(["--check"]) == 1
    assert capsys.readouterr().err == "Golden vectors are damaged: groups.json does not match SHA256SUMS\n"


def test_ids_flags_and_headers() -> None:
    contents = [json.loads(data) for name, data in golden.shipped().items() if name != golden.CHECKSUMS]
    assert len(CASES) == sum(len(content["cases"]) for content in contents), "two cases share an id"
    for content in contents:
        assert (content["schema"], content["spec"]) == (golden.SCHEMA, golden.SPEC)
        assert "50 digits" in content["generator"]
        assert set(content["notes"]) == {flag for case in content["cases"] for flag in case["flags"]}
    assert {flag for case in CASES.values() for flag in case.flags} == set(build.NOTES)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inputs(case: golden.Case) -> None:
    """Exact in float32, with squares that are finite there, and out of reach of a caller's update in place."""
    gradients = [g for row in case.gradients for g in row if g is not None]
    for x in [p for group in case.groups for p in group.params] + gradients:
        np.testing.assert_array_equal(x.astype(np.float32).astype(np.float64), x)
        assert not x.flags.writeable
    assert all(np.sum(np.square(g[np.isfinite(g)], dtype=np.float32)) < math.inf for g in gradients)
    assert case.expected[-1].step == len(case.gradients)
    if any(group.global_step < at.step for at in case.expected for group in at.groups):
        assert all(len(set(group.lr)) == 1 for group in case.groups), "lr by calls and by updates would differ"


def damaged(change: Callable[[dict[str, bytes]], None], resum: bool) -> dict[str, bytes]:
    shipped = golden.shipped()
    change(shipped)
    return {**shipped, golden.CHECKSUMS: golden.checksums(shipped)} if resum else shipped


def turn_a_digit(shipped: dict[str, bytes]) -> None:
    before = shipped["groups.json"]
    at = before.rindex(b"p-") - 1  # the last digit of a result
    shipped["groups.json"] = before[:at] + (b"0" if before[at : at + 1] != b"0" else b"1") + before[at + 1 :]


def drop_a_file(shipped: dict[str, bytes]) -> None:
    del shipped["long.json"]


def add_a_file(shipped: dict[str, bytes]) -> None:
    shipped["more.json"] = shipped["long.json"]


def drop_cases(shipped: dict[str, bytes]) -> None:
    for name in shipped:
        if name != golden.CHECKSUMS:
            shipped[name] = json.dumps({**json.loads(shipped[name]), "cases": []}).encode()


@pytest.mark.parametrize(
    ("change", "resum", "problem"),
    [
        (turn_a_digit, False, "groups.json does not match SHA256SUMS"),
        (drop_a_file, False, "long.json does not match SHA256SUMS"),
        (add_a_file, False, "more.json does not match SHA256SUMS"),
        (dict.clear, False, f"0 cases, fewer than {golden.FLOOR}"),
        (drop_cases, True, f"0 cases, fewer than {golden.FLOOR}"),
    ],
)
def test_load_refuses_damaged_files(change: Any, resum: bool, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = damaged(change, resum)
    monkeypatch.setattr(golden, "shipped", lambda: files)
    with pytest.raises(ValueError, match=problem):
        golden.load.__wrapped__()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (turn_a_digit, "groups.json is not what the oracle makes"),
        (drop_a_file, "long.json is not what the oracle makes"),
        (add_a_file, "SHA256SUMS is not what the oracle makes"),
        (dict.clear, "fewer than"),
        (lambda shipped: shipped.update({"basics.json": shipped["basics.json"] + b" " * maker.LIMIT}), "exceed"),
    ],
)
def test_check_fails(
    change: Any, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the checksums were made anew."""
    made, files = golden.shipped(), damaged(change, resum=True)
    monkeypatch.setattr(maker, "make", lambda: made)  # as the first test has shown
    monkeypatch.setattr(golden, "shipped", lambda: files)
    assert make(["--check"]) == 1
    assert problem in capsys.readouterr().err


def test_write_replaces_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = golden.shipped()
    (tmp_path / "stale.json").write_text("{}")
    monkeypatch.setattr(maker, "make", lambda: made)
    monkeypatch.setattr(golden, "folder", lambda: tmp_path)
    assert make(["--write"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made


# The oracle.


@pytest.mark.parametrize(
    ("exact", "rounded"),
    [
        ("1 + 2**-53", 1.0),  # a tie: to even
        ("1 + 2**-53 + 2**-90", 1 + 2**-52),
        ("-(1 + 2**-53 + 2**-90)", -1 - 2**-52),
        ("1 + 2**-53 - 2**-90", 1.0),
        ("2**-1074 * 1.25", 2**-1074),  # subnormal
        ("2**70 * 3", 3.0 * 2**70),
        ("0", 0.0),
    ],
)
def test_results_are_the_nearest_doubles(exact: str, rounded: float) -> None:
    with mpmath.workdps(50):
        two = mpmath.mpf(2)
        assert oracle._double(eval(exact.replace("2**", "two**"), {"two": two}) + mpmath.mpf(0)) == rounded


def test_oracle_at_adaptivity_1_is_adamw() -> None:
    """PyTorch's, which knows nothing of this project; to 1e-14 of the largest value, some ten roundings a step."""
    torch = pytest.importorskip("torch")
    case = CASES["basics/adaptivity-1-model"]
    (group,) = case.groups
    params = [torch.tensor(p, requires_grad=True) for p in group.params]
    options = {"lr": group.lr[0], "betas": (group.b1, group.b2), "eps": group.eps, "weight_decay": group.weight_decay}
    optimizer = torch.optim.AdamW(params, **options)
    for gradients in case.gradients:
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    for p, want in zip(params, case.expected[-1].groups[0].params, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=1e-14 * np.abs(want).max())


def test_oracle_at_adaptivity_0_is_normalised_momentum() -> None:
    """The first update is the gradient over the root of the model's mean square: the rule by hand."""
    case = CASES["basics/adaptivity-0-model"]
    (group,) = case.groups
    root = np.sqrt(np.mean(np.concatenate([g.ravel() for g in case.gradients[0]]) ** 2))
    for p, g, want in zip(group.params, case.gradients[0], case.expected[0].groups[0].params, strict=True):
        by_hand = p * (1 - group.lr[0] * group.weight_decay) - group.lr[0] * g / (root + group.eps)
        np.testing.assert_allclose(want, by_hand, rtol=1e-14)


def test_oracle_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mpmath", None)
    with pytest.raises(ImportError, match=r"needs mpmath.*ada2ms\[dev\]"):
        maker.check()
    for option in ("--check", "--write"):
        assert make([option]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# What the vectors reject.


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES.values() for dtype in support.precisions(case)],
    ids=lambda x: getattr(x, "id", x),
)
def test_the_rule_passes(case: golden.Case, dtype: str) -> None:
    """Loaded and replayed as the mutants are."""
    support.check(case, replay(mutate(), case, dtype), dtype)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_rejected(mutant: Mutant) -> None:
    """By the case named, and by its trajectory: a mutant that crashes is an error of this test."""
    reason = rejection(mutate(*mutant.edits), CASES[mutant.case])
    assert reason, f"{mutant.case} does not tell this mutant from the rule: {mutant.name}"
    print(f"{mutant.name}: {reason}")


def test_mutants_are_all_different() -> None:
    assert len({mutant.edits for mutant in MUTANTS}) == len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("slot", ["params", "exp_avg", "exp_avg_sq", "s", "step", "k", "skipped"])
def test_the_comparison_rejects(slot: str, dtype: str) -> None:
    """One value of one slot, a little off in the last record, fails: a count by 1, a number by 1e-4 of its tensor."""
    case = CASES["groups/differing-tensor"]
    recorded = {at.step: support.expected(at) for at in case.expected}
    snapshots = [recorded.get(step, recorded[1]) for step in range(1, len(case.gradients) + 1)]
    support.check(case, iter(snapshots), dtype)

    values = getattr(snapshots[-1], slot)
    if slot == "skipped":
        values = 1
    elif slot in ("step", "k"):
        values = [*values[:-1], values[-1] + 1]
    else:
        last = np.array(values[-1])
        last.flat[-1] += 1e-4 * np.max(np.abs(last))
        values = [*values[:-1], last]
    snapshots[-1] = replace(snapshots[-1], **{slot: values})
    with pytest.raises(AssertionError, match="step 10: "):
        support.check(case, iter(snapshots), dtype)


def test_the_comparison_rejects_a_run_that_ends_early() -> None:
    case = CASES["basics/defaults-model"]
    with pytest.raises(AssertionError):
        support.check(case, iter([support.expected(case.expected[0])]), "float64")
