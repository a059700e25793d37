"""Runs a page's Python snippets as a reader would paste them: `python tests/snippets.py README.md`.

They run in order, in one namespace. What the text before a snippet takes as given (a model, its optimizer) is made by
the function that `GIVEN` has for it; `THEN` has what must be so after it.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SNIPPET = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
Namespace = dict[str, Any]


def snippets(page: str) -> list[tuple[int, str]]:
    """The line at which each begins, and its text."""
    text = (ROOT / page).read_text()
    return [
        (text[: found.start(2)].count("\n"), re.sub(f"^{found[1]}", "", found[2], flags=re.MULTILINE))
        for found in SNIPPET.finditer(text)
    ]


def in_torch(space: Namespace) -> None:
    """A model in mid-run, with the gradients of its next step."""
    import torch

    from ada2ms.torch import Ada2MS

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer, x = Ada2MS(model.parameters(), lr=0.1), torch.ones(3, 4)
    for step in range(3):
        if step:
            optimizer.step()
        optimizer.zero_grad()
        model(x).square().sum().backward()
    space |= {"model": model, "optimizer": optimizer, "x": x}


def in_nnx(space: Namespace) -> None:
    """The same model in flax, with other weights."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = nnx.Linear(4, 8, rngs=nnx.Rngs(1)), nnx.Linear(8, 2, rngs=nnx.Rngs(2))

        def __call__(self, x: Any) -> Any:
            return self.second(nnx.relu(self.first(x)))

    space |= {"torch_model": space.get("model"), "model": Model()}


def handed_over(space: Namespace) -> None:
    """The logits are those of the model that stays."""
    import numpy as np

    stays, x = space["torch_model"], space["x"]
    np.testing.assert_allclose(space["model"](x.numpy()), stays(x).detach().numpy(), rtol=1e-6, atol=1e-6)
    assert str(space["report"])


def with_receipt(space: Namespace) -> None:
    from ada2ms.core import Receipt
    from ada2ms.torch import export_gradients, export_state, plain_layers

    in_torch(space)
    space |= {"layers": plain_layers(space["model"]), "Receipt": Receipt}
    space |= {"export_state": export_state, "export_gradients": export_gradients}


def with_groups(space: Namespace) -> None:
    """Two ways to the optimizer: a name is free for each framework's."""
    import torch

    from ada2ms.jax import ada2ms
    from ada2ms.torch import Ada2MS, param_groups

    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 4), "head": torch.nn.Linear(4, 2)})
    space |= {"model": model, "ada2ms": ada2ms, "Ada2MS": Ada2MS, "param_groups": param_groups}


def with_attention(space: Namespace) -> None:
    import numpy as np

    space |= {"heads": 2, "features": 3, "np": np}


def attention_is_cut(space: Namespace) -> None:
    (cut,) = space["axes"].values()
    assert [part.shape for part in cut(space["np"].zeros((18, 6)))] == [(6, 2, 3)] * len(space["names"]["attn.weight"])


def gpt2(space: Namespace) -> None:
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from ada2ms.torch import plain_layers

    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_head=2, n_layer=1))
    space |= {"model": model, "width": 16, "heads": 2, "np": np, "plain_layers": plain_layers}


def stage(space: Namespace) -> None:
    import torch
    from torch import distributed

    from ada2ms.torch import Ada2MS

    distributed.init_process_group("gloo", f"file://{Path.cwd()}/store", rank=0, world_size=1)
    space |= {"stage": torch.nn.Linear(2, 2), "Ada2MS": Ada2MS}


def frozen(space: Namespace) -> None:
    import optax

    from ada2ms.jax import ada2ms

    space |= {"optax": optax, "ada2ms": ada2ms, "frozen": {"a": True, "b": False}}


def frozen_stays(space: Namespace) -> None:
    params = {"a": 1.0, "b": 1.0}
    updates, _ = space["optimizer"].update(params, space["optimizer"].init(params), params)
    assert updates["a"] == 0 != updates["b"]


def training(space: Namespace) -> None:
    in_torch(space)
    space |= {"batches": [(space["x"], space["x"][:, :2])] * 2, "loss_of": lambda y, z: (y - z).square().mean()}


def in_jax(space: Namespace) -> None:
    import jax.numpy as jnp
    import optax

    space |= {"optax": optax, "params": {"w": jnp.ones(3)}, "schedule": optax.constant_schedule(0.1)}


def in_keras(space: Namespace) -> None:
    import keras
    import numpy as np

    space |= {"model": keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])}
    space |= {"x": np.ones((8, 4), "float32"), "y": np.ones((8, 2), "float32")}


def in_trainer(space: Namespace) -> None:
    """A model that returns its loss by name, and data that it takes by name."""
    import torch

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.layer(x) - labels).square().mean()}

    data = [{"x": torch.ones(4), "labels": torch.ones(2)}] * 8
    batches = torch.utils.data.DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    space |= {"model": Regression(), "data": data, "batches": batches}


def in_accelerate(space: Namespace) -> None:
    """As in a process of its own: the Trainer has settings, which accelerate has once."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    in_trainer(space)


def with_two_groups(space: Namespace) -> None:
    import torch

    module = space["Classifier"]()
    module.layer = torch.nn.Linear(4, 2)
    assert [group.get("weight_decay") for group in module.configure_optimizers().param_groups] == [0.01, 0.0]


def apart(space: Namespace) -> None:
    """A model, and the packages that are kept apart."""
    from examples_support import APART
    from run_with_torchvision import declare_operators

    sys.path.append(str(APART))
    declare_operators()
    in_torch(space)


def with_deepspeed(space: Namespace) -> None:
    """A process group of one, without what DeepSpeed would compile."""
    from torch import distributed

    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    distributed.init_process_group("gloo", f"file://{Path.cwd()}/store", rank=0, world_size=1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    in_torch(space)


def a_step_of_the_engine(space: Namespace) -> None:
    engine, x = space["engine"], space["x"]
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.backward(engine(x).square().sum())
    engine.step()
    assert all((p != q).any() for p, q in zip(engine.module.parameters(), before, strict=True))


def by_name_in_keras(space: Namespace) -> None:
    assert type(space["model"].optimizer) is type(space["optimizer"]) is space["Ada2MS"]
    assert space["optimizer"].adaptivity == 0.75


def a_trial(space: Namespace) -> None:
    import keras_tuner

    assert space["build"](keras_tuner.HyperParameters()).optimizer.adaptivity == 0.0


def recorder_of_torch(space: Namespace) -> None:
    from ada2ms.torch import Recorder, plain_layers

    in_torch(space)
    space |= {"Recorder": Recorder, "plain_layers": plain_layers}


def a_port(space: Namespace) -> None:
    """The rule in NumPy, as someone's own implementation without groups and clipping."""
    from ada2ms import core

    class Port:
        def __init__(self, params: Any, *, lr: Any, b1: float, b2: float, eps: float, weight_decay: float,
                     adaptivity: Any, scope: Any) -> None:  # fmt: skip
            hyper = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay, "adaptivity": adaptivity}
            self.params, self.rule = params, core.Ada2MS(params, lr=lr, scope=scope, **hyper)

        def step(self, gradients: Any) -> None:
            self.rule.step(gradients)

    space["make"] = Port


def most_was_checked(space: Namespace) -> None:
    assert len(space["report"].checked) > len(space["report"].unchecked) > 0


EXPORT = "export_state(model, optimizer, **plain_layers(model)).save("
# By page and a line, or the beginning of one, that one snippet of the page has.
GIVEN: dict[tuple[str, str], Callable[[Namespace], None]] = {
    ("README.md", EXPORT): in_torch,
    ("README.md", "optimizer = nnx.Optimizer("): in_nnx,
    ("README.md", 'with Recorder("original.trace"'): in_torch,
    ("docs/clipping.md", "optimizer = ada2ms("): with_groups,
    ("docs/conformance.md", "report = check(make)"): a_port,
    ("docs/global.md", "optimizer = Ada2MS(stage"): stage,
    ("docs/global.md", "optimizer = optax.selective_transform("): frozen,
    ("docs/handoff.md", EXPORT): in_torch,
    ("docs/handoff.md", "optimizer = nnx.Optimizer(model, ada2ms(**arguments(state))"): in_nnx,
    ("docs/handoff.md", "mappings = plain_layers("): in_nnx,
    ("docs/handoff.md", 'axes = {"attn.weight"'): with_attention,
    ("docs/handoff.md", "receipt = Receipt("): with_receipt,
    ("docs/layers.md", "mappings = plain_layers("): gpt2,
    ("docs/trainers.md", "trainer = Trainer("): in_trainer,
    ("docs/trainers.md", "accelerator = Accelerator("): in_accelerate,
    ("docs/trainers.md", "import ada2ms.timm"): apart,
    ("docs/trainers.md", "import deepspeed"): with_deepspeed,
    ("docs/trainers.md", "optimizer = optax.inject_hyperparams("): in_jax,
    ("docs/trace.md", "from ada2ms.torch import Recorder"): training,
    ("docs/trace.md", 'with Recorder("original.trace", model, optimizer, outputs=True'): recorder_of_torch,
    ("docs/trace.md", "from ada2ms.jax import Recorder"): in_jax,
    ("docs/trace.md", "from ada2ms.tf import Recorder"): in_keras,
}
THEN: dict[tuple[str, str], Callable[[Namespace], None]] = {
    ("README.md", "optimizer = nnx.Optimizer("): handed_over,
    ("docs/conformance.md", "report = check(make)"): most_was_checked,
    ("docs/global.md", "optimizer = optax.selective_transform("): frozen_stays,
    ("docs/handoff.md", "optimizer = nnx.Optimizer(model, ada2ms(**arguments(state))"): handed_over,
    ("docs/handoff.md", 'axes = {"attn.weight"'): attention_is_cut,
    ("docs/trainers.md", "class Classifier("): with_two_groups,
    ("docs/trainers.md", "import deepspeed"): a_step_of_the_engine,
    ("docs/trainers.md", "import keras"): by_name_in_keras,
    ("docs/trainers.md", "def build("): a_trial,
}


def begins(text: str, line: str) -> bool:
    """Whether a line of the text begins so."""
    return any(found.startswith(line) for found in text.splitlines())


def main(page: str) -> None:
    """Runs a page's snippets; an error is shown at its line of the page."""
    space: Namespace = {"__name__": "__main__"}
    for number, text in snippets(page):
        for (of, line), make in GIVEN.items():
            if of == page and begins(text, line):
                make(space)
        exec(compile("\n" * number + text, str(ROOT / page), "exec"), space)
        for (of, line), check in THEN.items():
            if of == page and begins(text, line):
                check(space)
    print(f"{len(snippets(page))} snippets of {page}")
    sys.stdout.flush()
    os._exit(0)  # without what frameworks do at the end of a process


if __name__ == "__main__":
    main(sys.argv[1])
