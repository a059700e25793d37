"""Ada2MS by its name in timm: `python examples/torch_timm.py` trains a Vision Transformer on handwritten digits.

timm makes the groups (a smaller learning rate for earlier layers, no weight decay of biases and other vectors), warms
the learning rate up and decays it, and saves checkpoints. A second run goes on from the checkpoint of half-way, and
ends with the same numbers.
"""

import argparse
import tempfile

import timm
import torch
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver
from torch.utils.data import DataLoader, TensorDataset

import ada2ms.timm  # noqa: F401  # registers the name
from ada2ms.core import Cosine
from ada2ms.demo.digits import load


def channels_first(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs

    data = load()
    training = TensorDataset(channels_first(data.train_images), torch.from_numpy(data.train_labels).long())
    images, labels = channels_first(data.test_images), torch.from_numpy(data.test_labels).long()
    batches = DataLoader(training, batch_size=64)
    updates = epochs * len(batches)

    def prepare():
        torch.manual_seed(0)
        shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
        optimizer = create_optimizer_v2(
            model,
            "ada2ms",
            lr=1e-2,
            weight_decay=0.05,
            layer_decay=0.8,
            adaptivity=Cosine(1.0, 0.5, updates),
            max_norm=1.0,  # in place of timm's dispatch_clip_grad
        )
        scheduler = CosineLRScheduler(
            optimizer, t_initial=updates, warmup_t=updates // 10, warmup_lr_init=1e-5, t_in_epochs=False
        )
        return model, optimizer, scheduler

    def train(model, optimizer, scheduler, epochs):
        for epoch in epochs:
            for i, (x, y) in enumerate(batches):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step_update(epoch * len(batches) + i + 1)

    whole, resumed = prepare(), prepare()
    with tempfile.TemporaryDirectory() as folder:
        train(*whole, range(epochs // 2))
        saver = CheckpointSaver(whole[0], whole[1], checkpoint_dir=folder, recovery_dir=folder)
        saver.save_checkpoint(epochs // 2 - 1)
        train(*whole, range(epochs // 2, epochs))
        start = resume_checkpoint(resumed[0], f"{folder}/last.pth.tar", resumed[1], log_info=False)
    resumed[2].step_update(start * len(batches))
    train(*resumed, range(start, epochs))

    model, groups = resumed[0], resumed[1].param_groups
    updates = int(resumed[1].state[groups[0]["params"][0]]["global_step"])
    scale = f"{groups[0]['lr_scale']:.3f}"
    print(f"{updates} updates, {len(groups)} groups, the first with {scale} of the rate, lr {groups[0]['lr']}")
    pairs = zip(whole[0].parameters(), model.parameters(), strict=True)
    print(f"resumed half-way, largest difference {max((p - q).abs().max().item() for p, q in pairs)}")
    model.eval()
    accuracy = (model(images).argmax(-1) == labels).float().mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
