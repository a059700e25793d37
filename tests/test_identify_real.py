"""What optimizers of torch, Optax and Keras compute, as `ada2ms identify` finds it out, and what differs among them."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from identify_table import row, rows

import support
from ada2ms.cli import main
from ada2ms.cli.subjects import load
from ada2ms.conformance import CannotRunError, Identification
from ada2ms.conformance.identification.identify import identify_subject
from ada2ms.conformance.identification.subject import Subject

Says = dict[str, str]

REAL: dict[str, Says] = {
    "torch.optim:AdamW": {
        "epsilon": "1e-08, outside the root, after bias correction",
        "weight decay": "0.01, decoupled, before the update",
        "missing gradient": "does nothing",
    },
    "torch.optim:Adam": {"weight decay": "0; with 0.1 it is coupled (in the gradient)"},
    "torch.optim:NAdam": {"Nesterov": "by NAdam's schedule, its product kept in float32"},
    "torch.optim:RAdam": {"epsilon": "before bias correction", "second moment": "RAdam"},
    "torch.optim:RMSprop": {"rule": "RMSprop", "epsilon": "1e-08, outside the root"},
    "torch.optim:Adamax": {"rule": "Adamax", "epsilon": "1e-08, inside the root"},
    "torch.optim:Adadelta": {"rule": "Adadelta"},
    "torch.optim:Adagrad": {"rule": "Adagrad", "epsilon": "1e-10, outside the root"},
    "torch.optim:SGD": {"rule": "SGD with momentum", "momentum": "0"},
    "optax:adamw": {"weight decay": "0.0001, decoupled", "missing gradient": "cannot be given"},
    "optax:nadam": {"Nesterov": "yes, by the next step's bias correction"},
    "optax:amsgrad": {"second moment": "after bias correction (AMSGrad)"},
    "optax:rmsprop": {"rule": "RMSprop", "epsilon": "1e-08, inside the root"},
    "optax:lion": {"rule": "Lion"},
    "optax:lamb": {"size of the update": "times the norm of the value over its own"},
    "optax:adabelief": {"second moment": "AdaBelief"},
    "ada2ms.torch:Ada2MS": {"rule": "Ada2MS", "mean of squares": "over the model"},
    "ada2ms.jax:ada2ms": {"rule": "Ada2MS", "missing gradient": "does nothing"},
}
KERAS: dict[str, Says] = {
    "keras.optimizers:AdamW": {
        "epsilon": "1e-07, outside the root, before bias correction",
        "weight decay": "0.004, decoupled, before the update",
        "missing gradient": "counts, and does nothing else",
    },
    "keras.optimizers:SGD": {"weight decay": "0; with 0.1 it is decoupled"},
}
QUICK = ("torch.optim:AdamW", "torch.optim:Adam", "torch.optim:NAdam")


def check(found: Identification, says: Says) -> None:
    assert found.explained, str(found)
    for feature, words in says.items():
        assert words in found.says(feature), (feature, words, str(found))


@pytest.mark.parametrize("address", [*QUICK, *support.slow(*(name for name in REAL if name not in QUICK))])
def test_real_optimizers_are_explained(address: str) -> None:
    check(identify_subject(load(address)), REAL[address])


@pytest.mark.keras
@pytest.mark.parametrize("address", ["keras.optimizers:AdamW", *support.slow("keras.optimizers:SGD")])
def test_keras_is_explained(address: str) -> None:
    check(identify_subject(load(address)), KERAS[address])


@pytest.mark.parametrize("adaptivity", [0.0, 0.3, *support.slow(1.0)])
def test_adaptivity_is_measured(adaptivity: float) -> None:
    """At 1 it is AdamW by its updates, which is what is said."""
    found = identify_subject(load("ada2ms.torch:Ada2MS", [f"adaptivity={adaptivity}"]))
    check(found, {"adaptivity": f"{adaptivity:g}", "rule": "Ada2MS"})


MODULE = """
import torch
import optax

class Clipped(torch.optim.AdamW):
    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.5)
        return super().step(closure)

def chain():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10)))

def wants(params, what):
    raise AssertionError

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_optimizers.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_optimizers"


def test_torch_adds_1e_6_to_the_norm_that_it_clips_by(module: str) -> None:
    found = identify_subject(load(f"{module}:Clipped"))
    check(found, {"clipping": "to 0.5, by the norm of the whole model plus 1e-6"})


@pytest.mark.slow
def test_a_schedule_is_measured(module: str) -> None:
    found = identify_subject(load(f"{module}:chain"))
    check(found, {"clipping": "to 0.5, by the norm of the whole model", "learning rate": "moves: 0.01, 0.0091, 0.0082"})


@pytest.mark.parametrize(
    ("address", "settings", "words"),
    [
        ("torch.optim:Adamw", [], "torch.optim has no Adamw (it has AdamW)"),
        ("torch.optim:AdanW", [], "torch.optim has no AdanW (it has AdamW, "),
        ("torch.optim:Nope", [], " more)"),
        ("optax:nope", [], "optax has no nope (it has adabelief, adadelta, "),
        ("torch.optim", [], "torch.optim is a module (must be module:name"),
        ("torch.optimm:AdamW", [], "torch.optimm cannot be imported"),
        ("AdamW", [], "must be module:name"),
        ("torch.optim:AdamW", ["lr"], "Invalid setting: 'lr'"),
        ("torch.optim:AdamW", ["bets=3"], "AdamW has no argument 'bets'"),
        ("torch.optim:AdamW", ["lr=-1"], "Invalid learning rate: -1"),
        ("torch.optim:LBFGS", [], "closure"),
        ("torch.optim:AdamW", ["lr=0.0"], "moves nothing"),
        ("my_optimizers:number", [], "must be a class or a function"),
        ("my_optimizers:wants", [], "wants what: give it by --set what=..."),
    ],
)
def test_what_cannot_be_run_says_why(module: str, address: str, settings: list[str], words: str) -> None:
    with pytest.raises(CannotRunError, match=r".") as caught:
        identify_subject(load(address, settings))
    assert words in str(caught.value)


def test_a_class_of_another_framework_than_was_said() -> None:
    with pytest.raises(
        CannotRunError, match=r"Invalid framework: 'keras' \(torch.optim:AdamW is an optimizer of torch\)"
    ):
        load("torch.optim:AdamW", kind="keras")


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["identify", "torch.optim:AdamW", "--set", "weight_decay=0.2", "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert data["explained"]
    assert data["hyper"]["weight_decay"] == 0.2
    assert main(["identify", "torch.optim:Rprop"]) == 1
    assert "unexplained: " in capsys.readouterr().out
    assert main(["identify", "torch.optim:Nothing"]) == 2
    assert "torch.optim has no Nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "settings", "moments", "values"),
    [
        ("torch.optim:AdamW", [], "kept in bfloat16", "rounded of what decay leaves by itself, too"),
        ("ada2ms.torch:Ada2MS", ["compensated=True"], "kept in float32 or wider", "what that loses is kept"),
        pytest.param("ada2ms.torch:Ada2MS", [], "kept in float32 or wider", "rounded once", marks=pytest.mark.slow),
        pytest.param("optax:adamw", [], "kept in bfloat16", "rounded once", marks=pytest.mark.slow),
    ],
)
def test_bits_of_moments_and_values_are_seen(address: str, settings: list[str], moments: str, values: str) -> None:
    subject = load(address, settings)
    found = identify_subject(Subject(**{**vars(subject), "dtypes": ("float64", "bfloat16")}))
    check(found, {"bfloat16 moments": moments, "bfloat16 values": values})


@pytest.mark.parametrize(
    "address", ["torch.optim:AdamW", *support.slow("torch.optim:Muon", "optax:amsgrad", "optax:lion")]
)
def test_the_table_has_what_is_found(address: str) -> None:
    """Digits of rounding differ between processors, and are left out."""
    assert row(address).rpartition("|")[0].rpartition("|")[0] == rows()[address].rpartition("|")[0].rpartition("|")[0]
