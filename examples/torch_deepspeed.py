"""Ada2MS in DeepSpeed's ZeRO: `python examples/torch_deepspeed.py` trains on handwritten digits in two processes.

ZeRO 1 divides the optimizer's state among the processes, ZeRO 2 the gradients as well. Each step is the one that a
single process would take: the mean of the squared gradients, and their norm, are over all processes. For each stage a
second run goes on from the checkpoint of half-way, and ends with the same numbers.
"""

import argparse
import os
import tempfile

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ada2ms.core import Cosine
from ada2ms.demo.digits import load
from ada2ms.torch import Ada2MS

WORLD, BATCH = 2, 64


def make(steps, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    # One group: DeepSpeed updates one group after the other, and the global second moment needs all gradients at once.
    optimizer = Ada2MS(model.parameters(), lr=5e-3, adaptivity=Cosine(1.0, 0.5, steps), max_norm=1.0, **options)
    return model, optimizer


def loss(model, images, labels):
    return nn.functional.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels).long())


def alone(steps, batches):
    """The parameters after the same steps in one process."""
    model, optimizer = make(steps)
    for batch in batches:
        optimizer.zero_grad()
        loss(model, *batch).backward()
        optimizer.step()
    return model


def difference(one, other):
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


def train(rank, port, folder, steps):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # C++ that would be compiled now, for inference alone
    )
    deepspeed.init_distributed("gloo", verbose=False)
    data = load()
    batches = list(data.batches(steps, seed=0, size=BATCH))
    reference = alone(steps, batches)

    def engine(stage):
        model, optimizer = make(steps, shard_group=dist.group.WORLD)
        config = {
            "train_micro_batch_size_per_gpu": BATCH // WORLD,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def run(engine, batches):
        for images, labels in batches:
            engine.backward(loss(engine, images[rank::WORLD], labels[rank::WORLD]))
            engine.step()

    for stage in (1, 2):
        whole = engine(stage)
        run(whole, batches[: steps // 2])
        whole.save_checkpoint(folder, f"stage {stage}")
        run(whole, batches[steps // 2 :])
        resumed = engine(stage)
        resumed.load_checkpoint(folder, f"stage {stage}")
        run(resumed, batches[steps // 2 :])
        if rank == 0:
            print(f"ZeRO {stage}: largest difference to one process {difference(whole.module, reference):.1e}")
            print(f"resumed half-way, largest difference {difference(whole.module, resumed.module)}")
            predictions = resumed.module(torch.from_numpy(data.test_images)).argmax(-1)
            print(f"test accuracy {(predictions == torch.from_numpy(data.test_labels)).float().mean():.3f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # finds a free port
    port = server.port
    del server
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (port, folder, steps), nprocs=WORLD)


if __name__ == "__main__":
    main()
