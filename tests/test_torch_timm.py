"""Ada2MS by its name in timm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from examples_support import BESIDE_TORCHVISION, ROOT, run

AS_ADAMW = """
import copy, logging, os, sys, tempfile
import timm, torch
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver

assert not list_optimizers("ada2ms")
import ada2ms.timm
from ada2ms.torch import Ada2MS
del sys.modules["ada2ms.timm"]
import ada2ms.timm  # once more, without timm's warning
assert list_optimizers("ada2ms") == ["ada2ms"]
assert get_optimizer_class("ada2ms") is Ada2MS

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
shape = {"img_size": 4, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
start = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)

def make(name, **options):
    model = copy.deepcopy(start)
    optimizer = create_optimizer_v2(model, name, lr=1e-2, weight_decay=0.1, **options)
    return model, optimizer, CosineLRScheduler(optimizer, 12, warmup_t=3, warmup_lr_init=1e-3, t_in_epochs=False)

def train(model, optimizer, scheduler, steps):
    for step in steps:
        x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step_update(step + 1)

def difference(one, other):
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))

for wrapper in ("", "lookahead_"):
    for options in ({}, {"layer_decay": 0.5}, {"param_group_fn": lambda m: [{"params": m.parameters()}]}):
        whole, adamw = make(wrapper + "ada2ms", adaptivity=1.0, **options), make(wrapper + "adamw", **options)
        train(*whole, range(12))
        train(*adamw, range(12))
        assert len(whole[1].param_groups) == len(adamw[1].param_groups)
        print(difference(whole[0], adamw[0]), difference(whole[0], start))
    whole, resumed = make(wrapper + "ada2ms", layer_decay=0.5), make(wrapper + "ada2ms", layer_decay=0.5)
    with tempfile.TemporaryDirectory() as folder:
        train(*whole, range(7))
        CheckpointSaver(whole[0], whole[1], checkpoint_dir=folder, recovery_dir=folder).save_recovery(0, 7)
        (file,) = os.listdir(folder)
        resume_checkpoint(resumed[0], os.path.join(folder, file), resumed[1], log_info=False)
    resumed[2].step_update(7)
    train(*whole, range(7, 12))
    train(*resumed, range(7, 12))
    print(difference(whole[0], resumed[0]), difference(whole[0], start))
"""

# What timm's train.py does with its options.
SCRIPT = """
import argparse, sys
import timm, torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import ParseKwargs
from beside import WIDTH

parser = argparse.ArgumentParser()
parser.add_argument("--opt")
parser.add_argument("--opt-betas", type=float, nargs="+")
parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
arguments = parser.parse_args(namespace=argparse.Namespace(lr=0.1, weight_decay=0.2, momentum=0.9))
model = torch.nn.Linear(WIDTH, 1)
optimizer = create_optimizer_v2(model, **optimizer_kwargs(arguments), **arguments.opt_kwargs)
model(torch.ones(2, WIDTH)).sum().backward()
optimizer.step()
group = optimizer.param_groups[-1]
names = ("lr", "betas", "weight_decay", "adaptivity", "max_norm")
print(__name__, type(optimizer).__name__, *(group[name] for name in names))
"""


@pytest.mark.slow
def test_by_name_as_adamw_by_name(tmp_path: Path) -> None:
    """At adaptivity 1 its steps, with timm's groups, layer decay, schedule and Lookahead; and on from a checkpoint."""
    (tmp_path / "script.py").write_text(AS_ADAMW)
    told = run("timm", "-W", "error", BESIDE_TORCHVISION, str(tmp_path / "script.py"))
    found = [tuple(map(float, line.split())) for line in told]
    assert len(found) == 8
    for i, (difference, moved) in enumerate(found):
        assert moved > 1e-2
        assert difference == 0 if i % 4 == 3 else difference < 1e-12


@pytest.mark.slow
def test_a_script_that_does_not_know_the_name(tmp_path: Path) -> None:
    """Is run as `python` runs it, by `python -m ada2ms.timm`."""
    (tmp_path / "beside.py").write_text("WIDTH = 3")
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--opt", "ada2ms", "--opt-betas", "0.8", "0.9", "--opt-kwargs", "adaptivity=0.75", "max_norm=2.0"]
    command = ["-m", "ada2ms.timm", str(tmp_path / "script.py"), *options]
    told = run("timm", "-W", "error", BESIDE_TORCHVISION, *command)
    assert told == ["__main__ Ada2MS 0.1 [0.8, 0.9] 0.2 0.75 2.0"]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "ada2ms.timm needs timm, which is not installed: pip install 'ada2ms[timm]'"),
        ("1.0.11", "ada2ms.timm needs timm 1.0.12 or later, with its registry of optimizers, not timm 1.0.11: pip"),
    ],
)
def test_what_is_said_where_timm_is_missing_or_old(version: str | None, said: str, tmp_path: Path) -> None:
    if version is not None:
        (tmp_path / "timm" / "optim").mkdir(parents=True)
        (tmp_path / "timm" / "__init__.py").write_text(f"__version__ = {version!r}")
        (tmp_path / "timm" / "optim" / "__init__.py").touch()
    hidden = "import sys; sys.path = [p for p in sys.path if not p.endswith('apart')]; "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", f"{hidden}import ada2ms.timm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
