"""More faults: groups, two at once, what gradients and state suffer between the loss and the optimizer."""

from typing import Any

from trace_training import CLASSES, DECAY, LR


def groups(head: float = 1.0, *, decay_of_biases: float = DECAY, layerwise: float = 1.0) -> Any:
    """A torch optimizer with a factor of the head's rate, a decay of biases, and a factor from layer to layer."""

    def make(net: Any) -> Any:
        import torch

        found = []
        for i, module in enumerate(net):
            rate = LR * layerwise ** (len(net) - 1 - i) * (head if i == len(net) - 1 else 1.0)
            for p in module.parameters():
                found.append({"params": [p], "lr": rate, "weight_decay": DECAY if p.ndim > 1 else decay_of_biases})
        return torch.optim.AdamW(found, lr=LR)

    return make


def penalized(net: Any, logits: Any, ys: Any) -> Any:
    """With a penalty on the squares of kernels."""
    from torch.nn import functional

    squares = sum(p.square().sum() for p in net.parameters() if p.ndim > 1)
    return functional.cross_entropy(logits, ys) + 0.005 * squares


def decayed(net: Any, i: int) -> None:
    for p in net.parameters():
        p.grad += 0.01 * p.detach()


def by_value(net: Any, i: int) -> None:
    import torch

    torch.nn.utils.clip_grad_value_(net.parameters(), 0.01)


def each_by_norm(net: Any, i: int) -> None:
    import torch

    for p in net.parameters():
        torch.nn.utils.clip_grad_norm_([p], 0.05)


def flipped(net: Any, i: int) -> None:
    for p in net.parameters():
        p.grad = -p.grad


def recounted(net: Any, opt: Any, i: int) -> None:
    if i == 4:
        for state in opt.state.values():
            state["step"].zero_()


def averaged(net: Any, opt: Any, i: int) -> None:
    """The weights become their moving average, which was meant for evaluation alone."""
    for p in net.parameters():
        before = getattr(p, "average", p.clone())
        p.average = 0.5 * before + 0.5 * p
        p.copy_(p.average)


def other_head(net: Any) -> None:
    import torch

    torch.manual_seed(5)
    torch.nn.init.normal_(net[3].weight, std=0.1)


def trained_before(net: Any) -> None:
    """With statistics of data that the network has seen before."""
    net[1].running_mean.fill_(0.3)
    net[1].running_var.fill_(1.7)


def evaluated_in_training_mode(net: Any, opt: Any, i: int) -> None:
    import torch

    if i == 3:
        net(torch.linspace(-1, 3, 96).reshape(8, 12))


def batch_norm(**options: Any) -> dict[str, Any]:
    return {"batch_norm": options}


def scaler(scale: float) -> Any:
    def make() -> Any:
        import torch

        return torch.amp.GradScaler("cpu", init_scale=scale)

    return make


def one_hot(ys: Any) -> Any:
    import torch

    return torch.nn.functional.one_hot(ys, CLASSES)


def optax_groups(head: float = 1.0, decay_of_biases: float = DECAY) -> Any:
    """Optax' multi_transform, with a factor of the head's rate and a decay of biases."""
    import jax
    import optax
    from trace_training import NAMES

    def kind(name: str) -> str:
        return ("head " if name.startswith("3.") else "body ") + ("kernel" if "kernel" in name else "bias")

    made = {
        f"{part} {what}": optax.adamw(rate, weight_decay=decay)
        for part, rate in (("head", head * LR), ("body", LR))
        for what, decay in (("kernel", DECAY), ("bias", decay_of_biases))
    }
    assert jax is not None
    return optax.multi_transform(made, {name: kind(name) for name in NAMES})


def optax_steps(every: int, mean: bool = True) -> Any:
    import optax

    return optax.MultiSteps(optax.adamw(LR, weight_decay=DECAY), every, use_grad_mean=mean)


def keras_ada2ms() -> Any:
    from ada2ms.tf import Ada2MS

    return Ada2MS(LR, adaptivity=1.0, weight_decay=DECAY)


def overflowing(at: int) -> Any:
    def spoil(net: Any, i: int) -> None:
        if i == at:
            net[0].weight.grad[0, 0] = float("inf")

    return spoil


SCALER = scaler(2.0**16)
HYPER = {"lr": LR, "weight_decay": DECAY, "b1": 0.9, "b2": 0.999, "eps": 1e-8}


def _of_gradients(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """What happens to gradients before the optimizer gets them."""
    return [
        fault("zero_grad forgotten", "gradient", "gradient of before", {"zero": False}, step=2, quick=True),
        fault("a penalty on squares in the loss", "forward", "penalty", {"loss": penalized}),
        fault("decay added to gradients", "gradient", "penalty", {"before": decayed}),
        fault("gradients clipped by value", "gradient", "clipping by value", {"before": by_value}),
        fault("each gradient clipped by its norm", "gradient", "clipping of each", {"before": each_by_norm}),
        fault("gradients with the other sign", "gradient", "factor", {"before": flipped}),
    ]


def _of_groups(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """Hyperparameters of some parameters, and schedules."""
    biases = {"made": groups(decay_of_biases=0.0)}
    untold: dict[str, Any] = {"hyper": None, "optimizer": lazy(optax_groups)}
    return [
        fault("the head's learning rate doubled", "hyperparameters", "lr", {"made": groups(2.0)}, quick=True),
        fault(
            "a learning rate that falls from layer to layer", "hyperparameters", "lr", {"made": groups(layerwise=0.8)}
        ),
        fault(
            "decay on biases in B alone", "hyperparameters", "weight_decay", {"made": groups()}, base=biases, quick=True
        ),
        fault(
            "a schedule by epochs of 3 steps",
            "hyperparameters",
            "lr unit",
            {"epoch": 3},
            base={"schedule": "decay"},
            step=2,
        ),
        fault(
            "a schedule that is missing",
            "hyperparameters",
            "lr unit",
            {"epoch": 99},
            base={"schedule": "decay"},
            step=2,
        ),
        fault(
            "the head's learning rate doubled, not told",
            "update",
            "lr",
            {"optimizer": lazy(optax_groups, 2.0)},
            b="jax",
            base_b=untold,
        ),
        fault(
            "decay on biases, not told",
            "update",
            "some updates",
            {"optimizer": lazy(optax_groups)},
            b="jax",
            base_a=biases,
            base_b={**untold, "optimizer": lazy(optax_groups, 1.0, 0.0)},
        ),
    ]


def _two(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """Two faults at once."""
    return [
        fault(
            "a larger epsilon, and another decay",
            "hyperparameters",
            "eps",
            {"optimizer": adamw(eps=1e-3, weight_decay=0.1)},
            quick=True,
        ),
        fault(
            "a loss that is summed, and a frozen bias",
            "forward",
            "reduction",
            {"reduction": "sum", "frozen": ("2.dense.bias",)},
            quick=True,
            also="2.dense.bias have no gradient in B",
        ),
        fault(
            "a loss scale that stays in, and a frozen bias",
            "gradient",
            "factor",
            {"scale": 1024.0, "frozen": ("2.dense.bias",)},
        ),
        fault(
            "clipping, and another learning rate",
            "gradient",
            "clipping",
            {"clip": 0.5, "wrong_from": (0, 0.5)},
            quick=True,
            also="lr is 0.01 in A and 0.005 in B",
        ),
        fault(
            "weights of another seed, and Adam for AdamW",
            "start",
            "initial values",
            {"seed": 3, "optimizer": other("Adam", weight_decay=DECAY)},
            also="coupled (in the gradient)",
        ),
        fault(
            "batches shifted by one, and another beta_2",
            "data",
            "shifted",
            {"data": {"shift": 1}, "optimizer": adamw(betas=(0.9, 0.99))},
            also="b2 is 0.999 in A and 0.99 in B",
        ),
    ]


def _around(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """What happens around the optimizer."""
    steps = {"optimizer": lazy(optax_steps, 2), "hyper": HYPER, "halves": 2}
    summed = {"optimizer": lazy(optax_steps, 2, mean=False), "hyper": HYPER, "halves": 2}
    return [
        fault("the head of another initialisation", "start", "initial values", {"start": other_head}),
        fault(
            "one layer in bfloat16",
            "forward",
            "precision",
            {"narrow": "0"},
            base={"outputs": True},
            quick=True,
            place="0.dense",
        ),
        fault("weights replaced by their moving average", "value", "changed outside", {"after": averaged}, step=3),
        fault("the count of steps lost at step 6", "update", "factor", {"after": recounted}, step=6, quick=True),
        fault(
            "a GradScaler that leaves out a step",
            "data",
            "skipped step",
            {"before": overflowing(3)},
            base={"scaler": SCALER},
            step=4,
        ),
        fault(
            "a GradScaler that leaves out its first step",
            "data",
            "skipped step",
            {"before": overflowing(0)},
            base={"scaler": SCALER},
        ),
        fault("an AMSGrad", "hyperparameters", "amsgrad", {"optimizer": adamw(amsgrad=True)}),
        fault("samples accumulated in unequal parts", "forward", "everything", {"accumulate": 3}),
        fault("MultiSteps that sums", "gradient", "factor", summed, b="jax", base_a={"accumulate": 2}, base_b=steps),
    ]


def _of_statistics(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """What changes no step in training, and spoils evaluation."""
    base = batch_norm()
    jax: dict[str, Any] = {"b": "jax", "base_a": base, "base_b": {"keeps": 0.9}}
    keras: dict[str, Any] = {
        "base": {"norm_eps": 1e-3},
        "base_b": {**batch_norm(momentum=0.9), "optimizer": lazy(keras_ada2ms)},
    }
    mistaken = batch_norm(momentum=0.9)
    return [
        fault("BatchNorm's momentum the wrong way round", "statistics", "momentum", mistaken, base=base, quick=True),
        fault("torch's momentum in flax", "statistics", "momentum", {"keeps": 0.1}, **jax),
        fault("new running statistics that are dropped", "statistics", "frozen", {"keeps": 1.0}, **jax),
        fault("frozen running statistics", "statistics", "frozen", batch_norm(momentum=0.0), base=base),
        fault("no running statistics", "statistics", "missing", batch_norm(track_running_stats=False), base=base),
        fault(
            "running statistics that were not restored",
            "start",
            "initial statistics",
            {"start": None},
            base={**base, "start": trained_before},
            quick=True,
        ),
        fault(
            "an evaluation in training mode after step 4",
            "statistics",
            "other statistics",
            {"after": evaluated_in_training_mode},
            base=base,
            step=5,
        ),
        fault(
            "Keras' default momentum",
            "statistics",
            "momentum",
            batch_norm(),
            a="jax",
            b="keras",
            **keras,
            base_a={"keeps": 0.9},
        ),
    ]


def _two_with_statistics(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """What hides no other fault, and is not hidden."""
    base, mistaken = batch_norm(), batch_norm(momentum=0.9)
    return [
        fault(
            "a mistaken momentum, and 0.9 of the learning rate from step 5 on",
            "statistics",
            "momentum",
            {**mistaken, "wrong_from": (4, 0.9)},
            base=base,
            also="at step 5, in the stage 'hyperparameters': lr is 0.01 in A and 0.009 in B",
        ),
        fault(
            "a mistaken momentum, and Adam for AdamW",
            "statistics",
            "momentum",
            {**mistaken, "optimizer": other("Adam", weight_decay=DECAY)},
            base=base,
            quick=True,
            also="in the stage 'update': the optimizers compute other things: weight decay",
        ),
        fault(
            "a loss that is summed, and a mistaken momentum",
            "forward",
            "reduction",
            {**mistaken, "reduction": "sum"},
            base=base,
            quick=True,
            also="in the stage 'statistics': 1.norm.mean, 1.norm.var move",
        ),
    ]


MAKERS = (_of_gradients, _of_groups, _two, _around, _of_statistics, _two_with_statistics)


def more(fault: Any, adamw: Any, other: Any, lazy: Any) -> list[Any]:
    """The faults, by what `trace_faults.py` has for them."""
    return [each for make in MAKERS for each in make(fault, adamw, other, lazy)]
