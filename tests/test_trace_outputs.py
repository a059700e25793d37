"""Outputs of the forward pass in traces: which is named as the first that differs, and what is said of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ada2ms.cli import main
from ada2ms.core.trace import Parameter, Step, Trace, TraceError, Verdict, Writer, causes, diff, file, places
from ada2ms.core.trace.model import TENSORS
from ada2ms.core.trace.outputs import MODEL, Output, activation, called
from ada2ms.core.trace.sketch import sketch

PARAMETERS = [Parameter("a", "a", (100, 3), "float32"), Parameter("b", "b", (4,), "float32")]
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 5, 4, 3)).astype(np.float32) + 0.3  # channels last


def test_names_of_modules_follow_from_their_parameters() -> None:
    names = {"b.w": "1.norm.scale", "b.b": "1.norm.bias", "c.w": ("3.attention.query.kernel", "3.attention.key.kernel")}
    assert called(["b.w", "b.b"], names) == called(["b.w", "b.b"], names.__getitem__) == "1.norm"
    assert called(["c.w"], names) == "3.attention"
    assert called(["d.e.w"], names) == called(["d.e.w"], None) == "d.e"
    assert called(["b.w", "c.w"], names) == called(["w"], names) == called([], names) == ""


Given = dict[str, Any] | list[tuple[str, Any]]


def run(
    path: Path, given: Given, loss: float = 1.0, noise: float = 0.0, full: int = 3, drift: float = 0.0, **more: Any
) -> Trace:
    """A trace of one step with these outputs, arrays by name, with gradients that have so much noise, and values that
    are so far away."""
    made = Writer(path, full=full)
    made.begin({"framework": more.pop("framework", "none")}, PARAMETERS)
    made.loss(lambda: loss)
    for name, x in given.items() if isinstance(given, dict) else given:
        options = dict(more)
        if isinstance(x, tuple):
            x, before = x
            options["inputs"] = [activation(before)]
        arrays = [activation(x)] if hasattr(x, "shape") else []
        made.output(Output(name, arrays, **options))
    rng = np.random.default_rng(9)
    values = [rng.normal(size=(5, *p.shape)) for p in PARAMETERS]
    sketches = [
        np.array([sketch(x[k] + noise * x[4]) for x in values]) for k, noise in ((0, drift), (1, noise), (2, 0))
    ]
    made.add(Step(1, dict(zip(TENSORS, sketches, strict=True)), np.zeros(len(PARAMETERS), bool)))
    made.close()
    return Trace.load(path)


def chain(**factors: float) -> dict[str, Any]:
    """Four outputs, those that are named and all after them multiplied."""
    found, by = {}, 1.0
    for k, name in enumerate("abcd"):
        by *= factors.get(name, 1.0)
        found[name] = (np.random.default_rng(k).normal(size=(6, 8)) * by).astype(np.float64)
    return found


def parted(tmp_path: Path, a: Given, b: Given, **more: Any) -> Verdict:
    found = diff(run(tmp_path / "a", a), run(tmp_path / "b", b, loss=1.1, noise=1.0, **more))
    assert (found.outcome, found.stage, found.kind) == ("parted", "forward", "everything"), found
    return found


def test_outputs_are_read_as_they_were_written_and_only_of_the_first_steps(tmp_path: Path) -> None:
    x = RNG.normal(size=(2, 3))
    trace = run(tmp_path / "a", [("h", (x, x)), ("h", x), ("h", x)], training=True)
    assert [each.name for each in trace.steps[0].outputs] == ["h", "h (2)", "h (3)"]
    assert trace.steps[0].outputs[0] == Output("h", [activation(x)], [activation(x)], True)
    assert not run(tmp_path / "b", chain(), full=0).steps[0].outputs
    old = Trace.load(Path(__file__).parent / "data" / "trace-before-statistics.trace")
    assert not any(each.outputs for each in old.steps)


@pytest.mark.parametrize("damaged", [3, [{"name": "a"}], [{"name": "a", "arrays": [{}], "inputs": []}]], ids=str)
def test_what_is_no_output_is_refused(damaged: Any, tmp_path: Path) -> None:
    run(tmp_path / "a", chain())
    other = file.Appender(tmp_path / "b")
    for chunk in file.read(tmp_path / "a"):
        assert not isinstance(chunk, int)
        for each in chunk[0].get("steps", []):
            each["outputs"] = damaged
        other.append(*chunk)
    other.close()
    with pytest.raises(TraceError, match="what is written in it is not what a trace has"):
        Trace.load(tmp_path / "b")


def test_the_first_that_differs_is_named(tmp_path: Path) -> None:
    found = parted(tmp_path, chain(), chain(c=1.01))
    assert found.place == "c"
    assert "the output of c is the first to differ (by " in found.cause
    assert "; that of b, before it, agrees" in found.cause
    assert json.loads(json.dumps(found.data()))["place"] == "c"
    assert found.look[0] == "c, and what lies between b and it"
    assert parted(tmp_path, chain(), chain(a=1.01)).place == "a"


def test_rounding_that_grows_is_not_named_and_a_jump_is(tmp_path: Path) -> None:
    """A jump that is small beside what it grows to, and beside what is far below any bound of a gradient."""
    growing = chain(a=1 + 1e-7, b=1 + 1e-6, c=1 + 1e-5, d=1 + 1e-4)
    found = parted(tmp_path, chain(), growing)
    assert not found.place
    assert "all outputs agree, the last is that of d" in found.cause
    assert parted(tmp_path, chain(), chain(b=1 + 1e-5, c=1 + 1e-4)).place == "b"
    assert parted(tmp_path, chain(), chain(a=1 + 1e-7, c=1 + 1e-5)).place == "c"


def test_values_that_have_drifted_apart_are_no_fault_of_the_first_module(tmp_path: Path) -> None:
    assert parted(tmp_path, chain(), chain(a=1 + 5e-6)).place == "a"
    assert not parted(tmp_path, chain(), chain(a=1 + 5e-6), drift=1e-6).place
    assert parted(tmp_path, chain(), chain(a=1 + 5e-6, c=1 + 1e-3), drift=1e-6).place == "c"


def test_in_one_framework_equal_shapes_are_one_layout(tmp_path: Path) -> None:
    square = RNG.normal(size=(4, 7, 7))
    given = {"a": square}, {"a": square.transpose(0, 2, 1)}
    for framework, place in (("torch", "a"), ("jax", "")):
        a = run(tmp_path / "a", given[0], framework="torch")
        assert diff(a, run(tmp_path / "b", given[1], loss=1.1, noise=1.0, framework=framework)).place == place


def test_what_long_sums_might_leave_is_named_only_where_nothing_differs_by_much_more(tmp_path: Path) -> None:
    """Here 2.6e-6; such as a BatchNorm leaves, whose sums are over all samples."""
    assert parted(tmp_path, chain(), chain(b=1 + 1.8e-6)).place == "b"
    assert parted(tmp_path, chain(), chain(b=1 + 1.8e-6, c=1 + 1e-5)).place == "b"
    assert parted(tmp_path, chain(), chain(b=1 + 1.8e-6, d=1.01)).place == "d"
    assert parted(tmp_path, chain(), chain(b=1 + 4e-6, d=1.01)).place == "b"


def test_what_a_module_is_given_tells_it_from_what_lies_before(tmp_path: Path) -> None:
    def pairs(at: str, inside: bool) -> dict[str, Any]:
        here, there = chain(), chain(**{at: 1.01})
        found = {}
        for name, before in zip("abcd", "-abc", strict=True):
            given = (here if before < at else there).get(before, IMAGES)
            found[name] = there[name], given * (1.01 if name == at and not inside else 1)
        return found

    found = parted(tmp_path, pairs("-", True), pairs("c", True))
    assert found.place == "c"
    assert "the output of c is the first to differ" in found.cause
    assert found.cause.endswith(", what it is given agrees")
    assert found.look[0].startswith("c itself")
    found = parted(tmp_path, pairs("-", True), pairs("c", False))
    assert "what c is given is the first to differ" in found.cause
    assert found.cause.endswith(", and the output of b, before it, agrees")
    assert found.look[0] == "what lies between b and c"


def test_a_module_of_modules_that_agree_is_named_itself(tmp_path: Path) -> None:
    """Such as a block that leaves out its residual: what it computes after the last of its modules."""
    a, b = ({"a": x, "b": (2 * x, x), "c": x} for x in (IMAGES[0], IMAGES[0]))
    b["b"] = IMAGES[1], IMAGES[0]
    found = diff(run(tmp_path / "a", a, composed=True), run(tmp_path / "b", b, loss=1.1, noise=1.0, composed=True))
    assert found.place == "b"
    assert found.look[0] == "what b computes besides its modules, after a"


def test_numbers_of_places_and_letters_are_compared_where_they_are_given_and_masks_are_not(tmp_path: Path) -> None:
    def of(places: Any) -> Given:
        return {"a": IMAGES[0], "table": (IMAGES[0][places % 5], places), "b": IMAGES[0]}

    places_ = np.arange(5, dtype=np.int32)
    found = parted(tmp_path, of(places_), of(places_ + 1))
    assert "what table is given is the first to differ" in found.cause
    mask = RNG.normal(size=(4, 4)) > 0
    masked = [{"a": (IMAGES[0], m), "b": (IMAGES[k], IMAGES[0])} for k, m in ((0, mask), (1, ~mask))]
    assert parted(tmp_path, *masked).place == "b"


def test_gradients_that_part_by_the_forward_pass_part_there(tmp_path: Path) -> None:
    """Though the loss does not differ: the stage is that of the output."""
    found = diff(run(tmp_path / "a", chain()), run(tmp_path / "b", chain(c=1.01), noise=1.0))
    assert (found.stage, found.kind, found.place) == ("forward", "everything", "c")
    found = diff(run(tmp_path / "a", chain()), run(tmp_path / "b", chain(), noise=1.0))
    assert (found.stage, found.kind, found.place) == ("gradient", "everything", "")
    assert any("the outputs of a, b and 2 more" in each for each in found.agrees)


def test_what_might_be_fewer_bits_is_none_where_outputs_before_it_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guessed(pair: Any, i: int, stage: str, *_: Any) -> Verdict:
        return Verdict("parted", "all differ without direction", stage, i + 1, "precision")

    monkeypatch.setattr(causes, "_precision", guessed)
    found = parted(tmp_path, chain(), chain(c=1.01))
    assert found.cause.startswith("loss and all gradients differ: the output of c is the first to differ")
    assert found.evidence[0] == "all differ without direction"
    found = diff(run(tmp_path / "a", chain()), run(tmp_path / "b", chain(a=1.01), loss=1.1, noise=1.0))
    assert (found.kind, found.place) == ("precision", "a")


def test_other_sizes_count_where_nothing_after_them_agrees(tmp_path: Path) -> None:
    a, b = chain(), chain()
    b["b"] = b["b"][:, :7]
    assert not parted(tmp_path, a, b).place, "what c gives agrees again"
    b |= {name: x for name, x in chain(c=1.01).items() if name != "b"}
    found = parted(tmp_path, a, b)
    assert found.place == "b"
    assert "of shape [6, 8] in A and [6, 7] in B" in found.cause
    found = parted(tmp_path, a, {name: x[:3] for name, x in a.items()})
    assert not found.place
    assert any("other sizes" in note for note in found.notes)


def test_names_types_and_modes(tmp_path: Path) -> None:
    """What only one run has is said where it lies between; other types and modes with what differs."""
    a, b = chain(), chain(c=1.01)
    there = [*list(b.items())[:2], ("extra", b["c"]), *list(b.items())[2:]]
    assert "the modules that one run alone has recorded there: extra in B" in parted(tmp_path, a, there).look
    found = parted(tmp_path, a, {f"B.{name}": x for name, x in b.items()})
    assert not found.place
    assert any("A's first is 'a', B's 'B.a'" in note for note in found.notes)
    found = parted(tmp_path, a, {name: x.astype(np.float16) for name, x in a.items()})
    assert found.place == "a", "a type is a difference by itself"
    assert "float64 in A and float16 in B" in found.cause
    a_trace = run(tmp_path / "a", a, training=False)
    found = diff(a_trace, run(tmp_path / "b", b, loss=1.1, noise=1.0, training=True))
    assert "c is in training mode in B alone" in found.evidence


def test_outputs_that_agree_again_are_said(tmp_path: Path) -> None:
    """Such as those of another branch; or what was recorded is not the same, before or after an activation."""
    mixed = {**chain(), "b": chain(b=1.5)["b"]}
    found = parted(tmp_path, chain(), mixed)
    assert found.place == "b"
    assert any(each.startswith("after b those of c, d agree: another branch, or what is") for each in found.evidence)
    assert not any("agree: another" in each for each in parted(tmp_path, chain(), chain(b=1.5)).evidence)


def test_where_nothing_was_recorded_it_says_how(tmp_path: Path) -> None:
    found = parted(tmp_path, {}, {})
    (look,) = [each for each in found.look if "outputs=True" in each]
    assert look.startswith("record both with outputs=True (torch, Keras) or recorder.output(name, x): the first")
    assert any(each.startswith("record B with") for each in parted(tmp_path, chain(), {}).look)
    found = parted(tmp_path, chain(), chain(), full=0)
    assert any(each.startswith("record B with") and ", with full=1:" in each for each in found.look)


def test_outputs_alone_part_nothing(tmp_path: Path) -> None:
    """They are evidence where a loss or gradients have parted; by themselves they are none."""
    found = diff(run(tmp_path / "a", chain()), run(tmp_path / "b", chain(b=2.0)))
    assert found.outcome == "only rounding", found
    assert not found.place


def test_show_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a", {"1.norm": np.zeros((2, 3)), MODEL: np.zeros((2, 1), np.float32)})
    assert main(["trace", "show", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["1.norm", "(2,", "3)", "float64", "output"] for line in lines), lines
    assert main(["trace", "show", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"] == {
        "1.norm": [[[2, 3], "float64"]],
        MODEL: [[[2, 1], "float32"]],
    }


def beside(first: float, later: float) -> dict[str, Any]:
    """The second output by so much, and those after it by another number, as of another branch."""
    return {**chain(c=1 + later), "b": chain(b=1 + first)["b"]}


def grown(by: float) -> dict[str, Any]:
    """Each output farther apart than the one before it."""
    return {name: x * (1 + 1e-7 * by**k) for k, (name, x) in enumerate(chain().items())}


def narrow(**factors: float) -> dict[str, Any]:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return {name: x.astype(ml_dtypes.bfloat16) for name, x in chain(**factors).items()}


def said(tmp_path: Path, a: Given, b: Given) -> tuple[str, bool]:
    found = parted(tmp_path, a, b)
    return found.place, any("agree: another branch" in each for each in found.evidence)


THRESHOLDS: dict[str, list[tuple[Callable[[], tuple[Given, Given]], tuple[str, bool]]]] = {
    "GROWTH": [
        (lambda: (chain(), grown(6)), ("", False)),
        (lambda: (chain(), {**grown(1), "d": chain(d=1 + 6e-6)["d"]}), ("d", False)),
    ],
    "ROUNDINGS": [
        (lambda: (narrow(), narrow(b=1.008)), ("", False)),
        (lambda: (narrow(), narrow(b=1.05)), ("b", False)),
    ],
    "_MUCH": [
        (lambda: (chain(), beside(1.5e-4, 4.5e-7)), ("b", False)),
        (lambda: (chain(), beside(1.5e-3, 4.5e-7)), ("b", True)),
    ],
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_of_places(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_trace_thresholds.py: a case on either side, and with ten times or a tenth of it one is wrong."""
    cases = [(make(), expected) for make, expected in THRESHOLDS[name]]
    assert all(said(tmp_path, *given) == expected for given, expected in cases)
    number = getattr(places, name)
    for factor in (10, 0.1):
        monkeypatch.setattr(places, name, number * factor)
        assert any(said(tmp_path, *given) != expected for given, expected in cases), factor
