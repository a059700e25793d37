"""Checkpoints of models that are divided among processes: what each process does, and asserts."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_support import OPTIONS, STEPS, assert_same, full, model, train
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch_support import shared_numbers

from ada2ms.torch import Ada2MS


def checkpoint(rank: int, world: int, flatten: bool, full_state: bool) -> None:
    """Saved in mid-training and resumed by torch.distributed.checkpoint: difference 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd
    from torch.distributed.fsdp import fully_shard

    options = sd.StateDictOptions(
        flatten_optimizer_state_dict=flatten, full_state_dict=full_state, broadcast_from_rank0=full_state
    )
    trained: list[Any] = []
    kept: Any = None
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    for resumed in (False, True):
        net = model()
        fully_shard(net)
        optimizer = Ada2MS(net.parameters(), **OPTIONS)
        if resumed and full_state:
            sd.set_optimizer_state_dict(net, optimizer, optim_state_dict=kept[1], options=options)
            sd.set_model_state_dict(net, kept[0], options=options)
        elif resumed:
            state: Any = dict(
                zip(("model", "optimizer"), sd.get_state_dict(net, optimizer, options=options), strict=True)
            )
            dcp.load(state, checkpoint_id=folder[0])
            sd.set_state_dict(
                net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
            )
        else:
            train(net, optimizer, range(2), rank, world)
            states = sd.get_state_dict(net, optimizer, options=options)
            kept = copy.deepcopy(states)
            if not full_state:
                dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder[0])
        assert shared_numbers(optimizer)["global_step"] == 2
        train(net, optimizer, range(2, STEPS), rank, world)
        trained.append(full(net))
    assert_same(trained[1], [p.detach() for p in trained[0]], bound=0)


def resharded(rank: int, world: int, folder: Path) -> None:
    """What two processes saved, four load, train on and save, and one loads and trains on: each load without a loss."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd
    from torch.distributed.fsdp import fully_shard

    net = model()
    if world > 1:
        fully_shard(net)
    optimizer = Ada2MS(net.parameters(), **OPTIONS)

    def everything() -> Any:
        """Model and optimizer, gathered from all processes."""
        return sd.get_state_dict(net, optimizer, options=sd.StateDictOptions(full_state_dict=True, cpu_offload=True))

    turn = [2, 4, 1].index(world)
    if turn > 0:
        state: Any = dict(zip(("model", "optimizer"), sd.get_state_dict(net, optimizer), strict=True))
        dcp.load(state, checkpoint_id=folder / str(turn - 1))
        sd.set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        found = everything()
        if rank == 0:
            saved = torch.load(folder / f"{turn - 1}.pt", weights_only=True)
            assert len(saved[1]["state"]) == 4
            for x, y in zip(tree_leaves(found), tree_leaves(saved), strict=True):
                assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
    train(net, optimizer, range(turn, turn + 1), rank, world)
    found = everything()
    if world > 1:
        dcp.save(
            dict(zip(("model", "optimizer"), sd.get_state_dict(net, optimizer), strict=True)),
            checkpoint_id=folder / str(turn),
        )
        if rank == 0:
            torch.save(found, folder / f"{turn}.pt")
    else:
        whole_net = model()
        train(whole_net, Ada2MS(whole_net.parameters(), **OPTIONS), range(3))
        assert_same(full(net), [p.detach() for p in whole_net.parameters()])
