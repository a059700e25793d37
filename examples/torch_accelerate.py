"""Ada2MS in a loop with Hugging Face's accelerate: `python examples/torch_accelerate.py` trains on handwritten digits.

accelerate computes in bfloat16 where that is safe, accumulates the gradients of two batches, and steps optimizer and
scheduler where an update is due; the optimizer clips the norm of what has been accumulated. A second run goes on from
the state that the first has saved half-way, and ends with the same numbers.
"""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ada2ms.core import Cosine
from ada2ms.demo.digits import load
from ada2ms.torch import Ada2MS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    options = parser.parse_args()
    epochs = options.epochs

    data = load()
    training = TensorDataset(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels).long())
    images, labels = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels).long()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=options.mixed_precision)

    def prepare():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
        batches = DataLoader(training, batch_size=32)
        updates = epochs * -(-len(batches) // 2)
        adaptivity = Cosine(1.0, 0.5, updates)
        optimizer = Ada2MS(model.named_parameters(), lr=5e-3, adaptivity=adaptivity, max_norm=1.0)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, updates)
        return accelerator.prepare(model, optimizer, batches, scheduler)

    def train(model, optimizer, batches, scheduler, epochs):
        for _ in range(epochs):
            for x, y in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.cross_entropy(model(x), y))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        whole = prepare()
        train(*whole, epochs // 2)
        accelerator.save_state(folder)
        train(*whole, epochs - epochs // 2)
        accelerator.free_memory()  # forgets what it has prepared, for load_state to find the new ones
        resumed = prepare()
        accelerator.load_state(folder)
        train(*resumed, epochs - epochs // 2)

    model, group = resumed[0], resumed[1].param_groups[0]
    updates = int(resumed[1].state[group["params"][0]]["global_step"])
    print(f"{updates} updates, lr {group['lr']:.1e}")
    pairs = zip(whole[0].parameters(), model.parameters(), strict=True)
    print(f"resumed half-way, largest difference {max((p - q).abs().max().item() for p, q in pairs)}")
    accuracy = (model(images).argmax(-1) == labels).float().mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
