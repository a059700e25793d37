"""Faults that are planted into the training scripts of `trace_training.py`, and what `ada2ms trace diff` says of them.

    PYTHONPATH=. python tests/trace_faults.py            prints the table
    PYTHONPATH=. python tests/trace_faults.py --write    writes it to docs/trace-faults.md

Each fault is a small change of B's script. Its twin is B without the change: of that the verdict must be "only
rounding".
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import trace_attention
import trace_training as training
from trace_faults_forward import forward
from trace_faults_more import more

from ada2ms.core.trace import Trace, Verdict, diff

LR, DECAY = training.LR, training.DECAY
DOCS = Path(__file__).parents[1] / "docs" / "trace-faults.md"


@dataclass
class Fault:
    """A change of a script, and the verdict that it must have.

    Attributes:
        name: of the fault, for people.
        stage, kind, step: of the verdict.
        change: of B's script.
        a, b: frameworks.
        base: of both scripts, but what concerns one framework alone.
        base_a, base_b: of one.
        quick: whether `make test` has it.
        also: what is said besides.
        place: what is named as the first that differs in the forward pass.
        script: what is trained, "training" or "attention".
    """

    name: str
    stage: str
    kind: str
    change: dict[str, Any]
    a: str = "torch"
    b: str = "torch"
    step: int = 1
    base: dict[str, Any] = field(default_factory=dict)
    base_a: dict[str, Any] = field(default_factory=dict)
    base_b: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    also: str = ""
    place: str = ""
    script: str = "training"


def adamw(**options: Any) -> Callable[[Any], Any]:
    def make(params: Any) -> Any:
        import torch

        return torch.optim.AdamW(params, **{"lr": LR, "weight_decay": DECAY, **options})

    return make


def other(kind: str, **options: Any) -> Callable[[Any], Any]:
    """A torch optimizer by name; "After", "Uncorrected" and "Weakened" are AdamW with a fault, "Ada2MS" is ours."""

    def make(params: Any) -> Any:
        import torch

        if kind == "Ada2MS":
            from ada2ms.torch import Ada2MS

            return Ada2MS(params, lr=LR, **options)
        if kind in ("After", "Uncorrected", "Weakened"):
            return faulty(kind)(params, lr=LR, weight_decay=DECAY)
        return getattr(torch.optim, kind)(params, lr=LR, **options)

    return make


def faulty(kind: str) -> Any:
    """AdamW, written by hand with one mistake."""
    import torch

    class AdamW(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                    state["t"] += 1
                    state["m"].lerp_(p.grad, 0.1)
                    state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                    first, second = 1 - 0.9 ** state["t"], 1 - 0.999 ** state["t"]
                    if kind == "Uncorrected":
                        first = second = 1.0
                    rate = group["lr"] * (0.9 if kind == "Weakened" and state["t"] > 5 else 1.0)
                    if kind != "After":
                        p.mul_(1 - rate * group["weight_decay"])
                    p.sub_(rate * state["m"] / first / ((state["v"] / second).sqrt() + 1e-8))
                    if kind == "After":
                        p.mul_(1 - rate * group["weight_decay"])

    AdamW.__module__ = "torch.optim"
    return AdamW


def optax_adamw(**options: Any) -> Any:
    import optax

    return optax.adamw(LR, **{"weight_decay": DECAY, **options})


def keras_optimizer(kind: str, **options: Any) -> Any:
    import keras

    from ada2ms.tf import Ada2MS

    return (Ada2MS if kind == "Ada2MS" else getattr(keras.optimizers, kind))(LR, **options)


class Lazy:
    """An optimizer that is made when it is needed, and is told from others by how."""

    def __init__(self, make: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._make, self._args, self._options = make, args, options

    def __call__(self) -> Any:
        return self._make(*self._args, **self._options)


OURS = {"optimizer": other("Ada2MS", adaptivity=1.0, weight_decay=DECAY)}
OURS_KERAS = {"optimizer": Lazy(keras_optimizer, "Ada2MS", adaptivity=1.0, weight_decay=DECAY)}
SGD = {"optimizer": other("SGD", momentum=0.9)}
UNTOLD: dict[str, Any] = {"optimizer": Lazy(optax_adamw), "hyper": None}
WIDE = {"norm_eps": 1e-3}  # Keras' own
OUTPUTS = {"outputs": True}

FAULTS = [
    Fault("weights of another seed", "start", "initial values", {"seed": 3}, quick=True),
    Fault("one kernel transposed", "start", "transposed", {"transposed": "2.dense.kernel"}, quick=True),
    Fault("batches shifted by one", "data", "shifted", {"data": {"shift": 1}}, quick=True),
    Fault("batches in another order", "data", "order", {"data": {"shuffle": 1}}),
    Fault("labels out of step with inputs", "data", "pairing", {"data": {"labels_rolled": True}}, quick=True),
    Fault("inputs divided by 255", "data", "scaled", {"data": {"scale": 1 / 255}}),
    Fault("another split of the data", "data", "other data", {"data": {"seed": 7}}),
    Fault("smaller batches", "data", "batch size", {"data": {"size": 6}}),
    Fault("a step left out", "data", "skipped step", {"skip": 3}, step=4, quick=True),
    Fault("a loss that is summed", "forward", "reduction", {"reduction": "sum"}, quick=True),
    Fault("a penalty in the reported loss alone", "forward", "only the loss", {"report": lambda x: x + 0.1}),
    Fault("dropout left on", "forward", "everything", {"dropout": 0.1}, base=OUTPUTS, place="2.dense"),
    Fault("ReLU for tanh", "forward", "everything", {"activation": "relu"}, base=OUTPUTS, place="2.dense"),
    Fault("label smoothing", "forward", "everything", {"smoothing": 0.1}, base=OUTPUTS),
    Fault(
        "another epsilon in LayerNorm",
        "forward",
        "everything",
        {"norm_eps": 1e-3},
        base=OUTPUTS,
        place="1.norm",
        quick=True,
    ),
    Fault("autocast to bfloat16", "forward", "precision", {"autocast": True}, quick=True),
    Fault("a loss scale that stays in", "gradient", "factor", {"scale": 1024.0}),
    Fault(
        "accumulation without dividing", "gradient", "factor", {"accumulate": 2, "forget_division": True}, quick=True
    ),
    Fault("gradients clipped in B alone", "gradient", "clipping", {"clip": 0.5}, quick=True),
    Fault("a frozen bias", "gradient", "missing gradients", {"frozen": ("2.dense.bias",)}),
    Fault("a detached layer", "gradient", "missing gradients", {"detach": True}),
    Fault("a schedule off by one", "hyperparameters", "lr shifted", {"off": 1}, base={"schedule": "decay"}, quick=True),
    Fault("0.9 of the learning rate from step 5 on", "hyperparameters", "lr", {"wrong_from": (4, 0.9)}, step=5),
    Fault("a larger epsilon", "hyperparameters", "eps", {"optimizer": adamw(eps=1e-3)}),
    Fault("another weight decay", "hyperparameters", "weight_decay", {"optimizer": adamw(weight_decay=0.1)}),
    Fault("another beta_2", "hyperparameters", "b2", {"optimizer": adamw(betas=(0.9, 0.99))}),
    Fault(
        "Nesterov's momentum in B alone",
        "hyperparameters",
        "nesterov",
        {"optimizer": other("SGD", momentum=0.9, nesterov=True)},
        base=SGD,
    ),
    Fault("Adam for AdamW", "update", "decay", {"optimizer": other("Adam", weight_decay=DECAY)}, quick=True),
    Fault("decay after the update", "update", "decay", {"optimizer": other("After")}),
    Fault("no bias correction", "update", "bias", {"optimizer": other("Uncorrected")}),
    Fault(
        "updates weakened within the optimizer from step 6 on",
        "update",
        "factor",
        {"optimizer": other("Weakened")},
        step=6,
    ),
    Fault("the optimizer's state lost at step 6", "update", "other updates", {"reset_at": 5}, step=6, quick=True),
    Fault("weights clamped after each step", "value", "changed outside", {"clamp": 0.3}, step=2),
    Fault("a loss that is summed", "forward", "reduction", {"reduction": "sum"}, b="jax"),
    Fault("stop_gradient after the first layer", "gradient", "zero gradients", {"stop": True}, b="jax"),
    Fault(
        "Optax' default decay, and hyperparameters not told",
        "update",
        "changed",
        {"optimizer": Lazy(optax_adamw, weight_decay=1e-4)},
        b="jax",
        base_b=UNTOLD,
    ),
    Fault(
        "eps_root for eps",
        "update",
        "eps",
        {"optimizer": Lazy(optax_adamw, eps=0.0, eps_root=1e-8)},
        b="jax",
        base_b=UNTOLD,
    ),
    Fault("one kernel transposed", "start", "transposed", {"transposed": "2.dense.kernel"}, b="jax"),
    Fault(
        "Keras' place for epsilon",
        "update",
        "eps",
        {"optimizer": Lazy(keras_optimizer, "AdamW", weight_decay=DECAY, epsilon=1e-8)},
        a="jax",
        b="keras",
        base=WIDE,
        base_b=OURS_KERAS,
    ),
    Fault(
        "Keras' own LayerNorm",
        "forward",
        "everything",
        {"norm_eps": 1e-3},
        a="jax",
        b="keras",
        base=OUTPUTS,
        base_a={"norm_eps": 1e-5},
        base_b={**OURS_KERAS, "norm_eps": 1e-5},
        place="1.norm",
    ),
    Fault(
        "a loss that is summed",
        "forward",
        "reduction",
        {"reduction": "sum"},
        a="jax",
        b="keras",
        base=WIDE,
        base_b=OURS_KERAS,
    ),
    Fault(
        "Keras' own initial weights",
        "start",
        "initial values",
        {"copied": False},
        b="keras",
        base=WIDE,
        base_a=OURS,
        base_b=OURS_KERAS,
    ),
    Fault(
        "Keras' default decay",
        "hyperparameters",
        "weight_decay",
        {"optimizer": adamw(weight_decay=0.004)},
        a="keras",
        base=WIDE,
        base_a=OURS_KERAS,
        base_b=OURS,
    ),
    Fault(
        "batches shifted by one",
        "data",
        "shifted",
        {"data": {"shift": 1}},
        a="keras",
        base=WIDE,
        base_a=OURS_KERAS,
        base_b=OURS,
    ),
    Fault(
        "gradients clipped in B alone",
        "gradient",
        "clipping",
        {"clip": 0.5},
        a="keras",
        base=WIDE,
        base_a=OURS_KERAS,
        base_b=OURS,
    ),
]

FAULTS += more(Fault, adamw, other, Lazy) + forward(Fault, OURS_KERAS)
FOLDER = tempfile.TemporaryDirectory()


@cache
def _run(script: str, framework: str, key: str, options: Any) -> Trace:
    module = {"training": training, "attention": trace_attention}[script]
    given = {name: x() if isinstance(x, Lazy) else x for name, x in options.given.items()}
    return Trace.load(getattr(module, f"train_{framework}")(Path(FOLDER.name) / "run", **given))


class _Options:
    """Options that are equal for the cache if they read the same."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Options)


def trace(framework: str, given: dict[str, Any], script: str = "training") -> Trace:
    """The trace of a script; scripts with the same options run once."""
    return _run(script, framework, repr(sorted(given.items(), key=str)), _Options(given))


def verdicts(fault: Fault) -> tuple[Verdict, Verdict]:
    """Of the fault, and of its twin."""
    a = trace(fault.a, {**fault.base, **fault.base_a}, fault.script)
    base = {**fault.base, **fault.base_b}
    if fault.a == fault.b:  # other rounding in B: the samples of each batch in another order
        base["data"] = {"within": True}
    return diff(a, trace(fault.b, {**base, **fault.change}, fault.script)), diff(a, trace(fault.b, base, fault.script))


def table() -> str:
    """As Markdown."""
    lines = [
        "# Faults and verdicts",
        "",
        "Each fault is planted into B's training script; the table is what `ada2ms trace diff A B` then says of step,",
        "stage and cause, and of B without the fault. Made by `PYTHONPATH=. python tests/trace_faults.py --write`; the",
        "tests check each row.",
        "",
        "| A, B | fault | step | stage | verdict | without it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault in FAULTS:
        found, twin = verdicts(fault)
        cause = "; also ".join([found.cause, *found.also]).replace("|", "\\|")
        lines.append(
            f"| {fault.a}, {fault.b} | {fault.name} | {found.step} | {found.stage} | {cause} | {twin.outcome} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        DOCS.write_text(table())
    else:
        print(table())
