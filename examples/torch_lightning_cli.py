"""Ada2MS by name in the Lightning CLI, to train a network on handwritten digits.

    python examples/torch_lightning_cli.py fit --config examples/torch_lightning_cli.yaml
    python examples/torch_lightning_cli.py fit --optimizer ada2ms.torch.Ada2MS --optimizer.adaptivity 0.75

Without arguments it trains as by the first, and once more from the checkpoint of half-way, which ends with the same
numbers.
"""

import sys
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ada2ms.demo.digits import load

CONFIG = Path(__file__).with_suffix(".yaml")


class Classifier(lightning.LightningModule):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, 10))

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)


class Digits(lightning.LightningDataModule):
    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        data = load()
        images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels).long()
        return DataLoader(TensorDataset(images, labels), batch_size=self.batch_size)


def command_line(*arguments):
    """Runs what the arguments say; those that the script was called with, if there are none."""
    return LightningCLI(Classifier, Digits, args=list(arguments) or None, save_config_callback=None)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit = ("fit", "--config", str(CONFIG), "--trainer.enable_checkpointing=false")
        whole = command_line(*fit).trainer
        command_line(*fit, "--trainer.max_epochs=5").trainer.save_checkpoint(f"{folder}/half.ckpt")
        resumed = command_line(*fit, f"--ckpt_path={folder}/half.ckpt").trainer

    model, optimizer = resumed.lightning_module, resumed.optimizers[0]
    group = optimizer.param_groups[0]
    updates = int(optimizer.state[group["params"][0]]["global_step"])
    print(f"{updates} updates, adaptivity {group['adaptivity']}, lr {group['lr']:.1e}")
    pairs = zip(whole.lightning_module.parameters(), model.parameters(), strict=True)
    print(f"resumed half-way, largest difference {max((p - q).abs().max().item() for p, q in pairs)}")
    data = load()
    predictions = model.layers(torch.from_numpy(data.test_images)).argmax(-1)
    print(f"test accuracy {(predictions == torch.from_numpy(data.test_labels)).float().mean():.3f}")


if __name__ == "__main__":
    if sys.argv[1:]:
        command_line()
    else:
        main()
