"""Ada2MS in Hugging Face's Trainer: `python examples/torch_trainer.py` trains a network on handwritten digits.

The Trainer makes the optimizer, with groups with and without weight decay, accumulates the gradients of two batches,
warms the learning rate up and decays it; the optimizer clips the gradients' norm, so that the Trainer need not. A
second run goes on from the checkpoint that the first has left half-way, and ends with the same numbers.
"""

import argparse
import tempfile

import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from ada2ms.core import Linear
from ada2ms.demo.digits import load
from ada2ms.torch import Ada2MS


class Network(nn.Module):
    """Returns the loss and the logits, as the Trainer expects."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 10))

    def forward(self, images, labels):
        logits = self.layers(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(samples):
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    data = load()
    training = TensorDataset(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels).long())
    images, labels = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels).long()

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,  # max_norm of Ada2MS clips
            learning_rate=2e-3,
            weight_decay=1e-2,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            save_steps=steps // 2,
            logging_steps=steps // 4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )

        def trainer():
            torch.manual_seed(0)
            chosen = {"lr": options.learning_rate, "adaptivity": Linear(1.0, 0.5, steps), "max_norm": 1.0}
            optimizer = Ada2MS, chosen
            return Trainer(Network(), options, collate, train_dataset=training, optimizer_cls_and_kwargs=optimizer)

        whole = trainer()
        whole.train()
        resumed = trainer()
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{steps // 2}")

    decayed, other = resumed.optimizer.param_groups
    updates = int(resumed.optimizer.state[decayed["params"][0]]["global_step"])
    print(f"{updates} updates, weight decay {decayed['weight_decay']} and {other['weight_decay']}, lr {decayed['lr']}")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    print(f"resumed half-way, largest difference {max((p - q).abs().max().item() for p, q in pairs)}")
    resumed.model.eval()
    accuracy = (resumed.model(images, labels)["logits"].argmax(-1) == labels).float().mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
