"""The examples that use torch, each run as a user runs it."""

import pytest
from examples_support import BESIDE_TORCHVISION, FOLDER, check_accuracy, run

# What each imports; updates and learning rate at its end, as its options and schedule have it (1437 images: 45 batches
# of 32, the gradients of two of them accumulated, in 10 epochs).
EXAMPLES = {
    "torch_accelerate": ("accelerate", "230 updates, lr 5.0e-04"),
    "torch_lightning": ("lightning", "230 updates, lr 0.0e+00"),
    "torch_lightning_cli": (
        "jsonargparse",
        "450 updates, adaptivity Cosine(start=1.0, end=0.5, steps=450), lr 0.0e+00",
    ),
    "torch_timm": ("timm", "460 updates, 8 groups, the first with 0.512 of the rate, lr 0.0"),
    "torch_trainer": ("transformers", "200 updates, weight decay 0.01 and 0.0, lr 0.0"),
}
THEIRS = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"  # Lightning's use of torch


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example: str) -> None:
    """As many updates as it should make; resumed from its checkpoint without any difference; nine in ten recognised."""
    package, end = EXAMPLES[example]
    script = [str(FOLDER / f"{example}.py")]
    if package == "timm":
        script.insert(0, BESIDE_TORCHVISION)
    told = run(package, "-W", "error", "-W", THEIRS, *script)
    assert told[-3:-1] == [end, "resumed half-way, largest difference 0.0"]
    check_accuracy(told[-1])


@pytest.mark.slow
def test_deepspeed() -> None:
    """In both stages as one process, but for the order of sums: 2e-6. With means of each process' own it is 0.07."""
    told = run("deepspeed", str(FOLDER / "torch_deepspeed.py"))
    for stage in (1, 2):
        found = [i for i, line in enumerate(told) if line.startswith(f"ZeRO {stage}: largest difference")]
        assert len(found) == 1, told
        assert float(told[found[0]].rsplit(" ", 1)[1]) < 1e-4, told
        assert told[found[0] + 1] == "resumed half-way, largest difference 0.0"
        check_accuracy(told[found[0] + 2])


def test_every_example_is_run() -> None:
    assert sorted(p.stem for p in FOLDER.glob("torch_*.py")) == sorted([*EXAMPLES, "torch_deepspeed"])
