"""Ada2MS with Lightning: `python examples/torch_lightning.py` trains a network on handwritten digits.

Lightning accumulates the gradients of two batches, clips their norm, and steps a scheduler of the learning rate. A run
that goes on from a checkpoint of half-way ends with the same numbers as one that was never interrupted.
"""

import argparse
import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ada2ms.core import NO_DECAY, Linear
from ada2ms.demo.digits import load
from ada2ms.torch import Ada2MS, param_groups


class Classifier(lightning.LightningModule):
    def __init__(self, updates: int) -> None:
        super().__init__()
        self.updates = updates
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def configure_optimizers(self):
        groups = param_groups(self, [NO_DECAY])
        optimizer = Ada2MS(groups, lr=5e-3, adaptivity=Linear(1.0, 0.5, self.updates))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs

    data = load()
    training = TensorDataset(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels).long())
    images, labels = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels).long()
    batches = DataLoader(training, batch_size=32)
    updates = epochs * -(-len(batches) // 2)

    def fit(epochs, checkpoint=None):
        torch.manual_seed(0)
        model = Classifier(updates)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(model, batches, ckpt_path=checkpoint)
        return trainer

    whole = fit(epochs)
    with tempfile.TemporaryDirectory() as folder:
        fit(epochs // 2).save_checkpoint(f"{folder}/half.ckpt")
        resumed = fit(epochs, f"{folder}/half.ckpt")

    model, group = resumed.lightning_module, resumed.optimizers[0].param_groups[0]
    updates = int(resumed.optimizers[0].state[group["params"][0]]["global_step"])
    print(f"{updates} updates, lr {group['lr']:.1e}")
    pairs = zip(whole.lightning_module.parameters(), model.parameters(), strict=True)
    print(f"resumed half-way, largest difference {max((p - q).abs().max().item() for p, q in pairs)}")
    accuracy = (model.layers(images).argmax(-1) == labels).float().mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
