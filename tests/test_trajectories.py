"""All against all: the same gradients give the same updates, and the same training gives the same trajectory.

Keras runs on the backend that KERAS_BACKEND names; the test command runs the tests that use it on each of the three.
"""

import os
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest

from ada2ms import core
from ada2ms.core import golden
from ada2ms.demo import digits
from ada2ms.demo.digits import Array
from ada2ms.demo.run import deviation
from replays import REPLAYS
from support import (
    EPSILON,
    check,
    needs_compiler,
    place,
    precisions,
    require_device,
    settings,
    slow,
)

CASES = golden.load()
# Keras says where a gradient is missing, which the cases mean.
GRADIENTS_MAY_BE_MISSING = pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")


def marked(*names: str) -> Any:
    """A parameter of tests, marked where it involves Keras, or takes long."""
    marks = [pytest.mark.keras] if any("keras" in name for name in names) else []
    if "jax-eager" in names:  # the code that jax-jit compiles, which takes long uncompiled
        marks.append(pytest.mark.slow)
    if "torch-fused" in names:
        marks.append(needs_compiler)
    return pytest.param(*names, marks=marks)


# Open loop: the gradients of the golden vectors.


def replays() -> list[Any]:
    """Every case in every backend; where compiled ones and Keras are to show their roundings alone, for `make slow`."""
    found = []
    for name in REPLAYS:
        for case in CASES:
            for dtype in precisions(case):
                (backend,), marks = marked(name).values, list(marked(name).marks)
                if backend in ("keras", "jax-jit") and dtype == "float32" and "float64" in precisions(case):
                    marks.append(pytest.mark.slow)
                found.append(pytest.param(case, dtype, backend, id=f"{backend}-{case.id}-{dtype}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "dtype", "backend"), replays())
@GRADIENTS_MAY_BE_MISSING
def test_golden(case: golden.Case, backend: str, dtype: str) -> None:
    """The bounds and their reasons are those of `support.check`."""
    check(case, REPLAYS[backend](case, dtype, "cpu"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", [marked(name) for name in REPLAYS if name != "numpy"])
@GRADIENTS_MAY_BE_MISSING
def test_golden_on_a_gpu(backend: str, dtype: str) -> None:
    """All cases in one test, which names each that fails: apart, they would be 1500 skipped tests without a GPU."""
    require_device(backend.partition("-")[0], "gpu")
    failures = []
    for case in CASES:
        if dtype not in precisions(case):
            continue
        try:
            check(case, REPLAYS[backend](case, dtype, "gpu"), dtype)
        except pytest.skip.Exception:  # a case that this framework cannot state
            continue
        except Exception as error:  # of one case, whatever it is: the others are run too
            failures.append(f"{case.id}: {type(error).__name__}: {error}".partition("\n")[0])
    assert not failures, "\n".join(failures)


# Closed loop: each framework's own autodiff, on real data.

STEPS = 200
LEARNING_RATE, SGD_LEARNING_RATE = 2.0**-7, 2.0**-4  # exact in float32, in which Keras keeps them
FRAMEWORKS = ("torch", "jax", "keras")
NETWORKS = {"convnet": digits.CONVNET, "mlp": digits.MLP}
EACH_NETWORK = ["convnet", *slow("mlp")]  # the convnet ends in a dense layer too
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw-like": {"adaptivity": 1.0},
    "half-way": {"adaptivity": 0.5},
    "sgd-like": {"adaptivity": 0.0},
    "transition": {"adaptivity": core.Cosine(1.0, 0.0, STEPS // 2)},
    "tensor": {"adaptivity": 0.5, "scope": "tensor"},
}


def torch_trainer(weights: list[Array], options: dict[str, Any] | None, device: str) -> digits.Trainer:
    import torch

    from ada2ms.demo.on_torch import TorchTrainer
    from ada2ms.torch import Ada2MS

    if options is None:
        make = partial(torch.optim.SGD, lr=SGD_LEARNING_RATE, momentum=0.9)
    else:
        make = partial(Ada2MS, lr=LEARNING_RATE, **options)
    return TorchTrainer(weights, make, place("torch", device))


def jax_trainer(weights: list[Array], options: dict[str, Any] | None, device: str) -> digits.Trainer:
    import optax

    from ada2ms.demo.on_jax import JaxTrainer
    from ada2ms.jax import ada2ms

    sgd = optax.sgd(SGD_LEARNING_RATE, momentum=0.9)
    return JaxTrainer(weights, sgd if options is None else ada2ms(LEARNING_RATE, **options))


def keras_trainer(weights: list[Array], options: dict[str, Any] | None, device: str) -> digits.Trainer:
    import keras

    from ada2ms.demo.on_keras import KerasTrainer
    from ada2ms.tf import Ada2MS

    sgd = keras.optimizers.SGD(SGD_LEARNING_RATE, momentum=0.9)
    return KerasTrainer(weights, sgd if options is None else Ada2MS(LEARNING_RATE, **options))


TRAINERS = {"torch": torch_trainer, "jax": jax_trainer, "keras": keras_trainer}


@cache
def trajectory(framework: str, network: str, dtype: str, optimizer: str, device: str = "cpu") -> list[list[Array]]:
    """The parameters after every step; `optimizer` is one of `OPTIMIZERS`, or the framework's own momentum SGD.

    The processes of one test command, which differ in Keras' backend alone, share those of the other frameworks through
    the folder that SHARED_TRAJECTORIES names.
    """
    folder = os.environ.get("SHARED_TRAJECTORIES")
    if folder is None or framework == "keras" or device != "cpu":
        return train(framework, network, dtype, optimizer, device)
    file = Path(folder, f"{framework}-{network}-{dtype}-{optimizer}.npz")
    if not file.exists():
        found = train(framework, network, dtype, optimizer, device)
        with NamedTemporaryFile(dir=folder, delete=False) as written:  # beside another process that does the same
            np.savez(written, *(np.stack(arrays) for arrays in zip(*found, strict=True)))
        Path(written.name).replace(file)
    with np.load(file) as stored:
        return [list(arrays) for arrays in zip(*stored.values(), strict=True)]


def train(framework: str, network: str, dtype: str, optimizer: str, device: str) -> list[list[Array]]:
    """The parameters after every step, once it has learnt something."""
    data = digits.load(dtype)
    weights = digits.initial_weights(NETWORKS[network], seed=0, dtype=dtype)
    with settings(framework, dtype, device):
        trainer = TRAINERS[framework](weights, OPTIMIZERS.get(optimizer), device)
        found = []
        for images, labels in data.batches(STEPS, seed=0):
            trainer.step(images, labels)
            found.append(trainer.parameters())
        assert np.mean(trainer.predict(data.test_images) == data.test_labels) > 0.8, "it did not learn"
    return found


def largest_deviation(left: tuple[str, str], right: tuple[str, str], network: str, dtype: str, optimizer: str) -> float:
    """Over all steps, between two runs, each a framework and a device."""
    runs = [trajectory(framework, network, dtype, optimizer, device) for framework, device in (left, right)]
    return max(deviation(a, b) for a, b in zip(*runs, strict=True))


# Golden cases run the rule on every backend of Keras; what training adds to them is run in full on one.
ON_TENSORFLOW = os.environ["KERAS_BACKEND"] == "tensorflow"


def often(*optimizers: str) -> list[Any]:
    """Every optimizer, those that are not named here for `make slow`."""
    return [*optimizers, *slow(*(name for name in OPTIMIZERS if name not in optimizers))]


PAIRS = [marked(*pair) for pair in combinations(FRAMEWORKS, 2)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS if ON_TENSORFLOW else often("half-way", "transition", "tensor"))
@pytest.mark.parametrize("network", EACH_NETWORK)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_closed_loop_float64(left: str, right: str, network: str, optimizer: str) -> None:
    """450 epsilons, at every step. Sums in another order cost about one epsilon of the gradient a step; in these loops
    plain SGD parts by some 40 epsilons in 200 steps. The bound leaves ten times that for other processors' sums."""
    assert largest_deviation((left, "cpu"), (right, "cpu"), network, "float64", optimizer) < 1e-13


@pytest.mark.parametrize("optimizer", often(*(["half-way", "transition"] if ON_TENSORFLOW else [])))
@pytest.mark.parametrize("network", EACH_NETWORK)
@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_closed_loop_float32(left: str, right: str, network: str, optimizer: str) -> None:
    """What the frameworks' own momentum SGD parts by in the same loop measures the rounding of their gradients. Ada2MS
    divides by the root of an average of squares, which lifts the rounding of small entries to that of the large ones,
    and rounds more often itself: ten times that much is allowed, at every step."""
    yardstick = max(
        largest_deviation((a, "cpu"), (b, "cpu"), network, "float32", "sgd") for a, b in combinations(FRAMEWORKS, 2)
    )
    assert 0 < yardstick < 1e-5
    assert largest_deviation((left, "cpu"), (right, "cpu"), network, "float32", optimizer) < 10 * yardstick


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_closed_loop_on_a_gpu(framework: str, optimizer: str) -> None:
    """A GPU sums in another order than a CPU, as two frameworks do: the same bound, in float64."""
    assert largest_deviation((framework, "gpu"), (framework, "cpu"), "convnet", "float64", optimizer) < 1e-13


def test_the_closed_loop_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a million of the learning rate is far outside of the float64 bound, and so is another adaptivity."""
    weights = digits.initial_weights(digits.MLP, seed=0, dtype="float64")
    images, labels = next(digits.load("float64").batches(1, seed=0))
    found = []
    for lr, adaptivity in ((0.01, 0.5), (0.01 * (1 + 1e-6), 0.5), (0.01, 0.5 + 1e-6)):
        monkeypatch.setattr(f"{__name__}.LEARNING_RATE", lr)
        trainer = torch_trainer(weights, {"adaptivity": adaptivity}, "cpu")
        trainer.step(images, labels)
        found.append(trainer.parameters())
    assert deviation(found[1], found[0]) > 1e-9
    assert deviation(found[2], found[0]) > 1e-9


# The two ends of the adaptivity, against optimizers that are not ours.


def gradients_and_weights(dtype: str) -> tuple[list[Array], list[list[Array]]]:
    """The convnet's weights, and gradients of their shapes whose sizes differ by tensor and by step."""
    rng = np.random.default_rng(0)
    weights = digits.initial_weights(digits.CONVNET, seed=0, dtype=dtype)
    steps = [
        [
            (10.0 ** (i % 4 - 2) * rng.standard_normal(w.shape) * rng.random()).astype(dtype)
            for i, w in enumerate(weights)
        ]
        for _ in range(50)
    ]
    return weights, steps


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adaptivity_1_is_adamw_of_torch(dtype: str) -> None:
    """The same formulas in nearly the same order: some epsilons a step. In float32 too, torch's AdamW takes its bias
    corrections in double precision, as ours does."""
    import torch

    from ada2ms.torch import Ada2MS

    weights, steps = gradients_and_weights(dtype)
    found = []
    for make in (partial(Ada2MS, adaptivity=1.0), torch.optim.AdamW):
        params = [torch.tensor(w, requires_grad=True) for w in weights]
        optimizer = make(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        for gradients in steps:
            for p, g in zip(params, gradients, strict=True):
                p.grad = torch.tensor(g)
            optimizer.step()
        found.append([p.detach().numpy() - w for p, w in zip(params, weights, strict=True)])
    assert deviation(*found) < 4 * len(steps) * EPSILON[dtype]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adaptivity_1_is_adamw_of_optax(dtype: str) -> None:
    """Optax corrects the bias by 1 - b**t in the precision of the parameters; at b2 = 0.99 that is off by up to 100
    epsilons in the first steps, half of which reach the update."""
    import jax
    import jax.numpy as jnp
    import optax

    from ada2ms.jax import ada2ms

    weights, steps = gradients_and_weights(dtype)
    found = []
    with settings("jax", dtype, "cpu"):
        for make in (partial(ada2ms, adaptivity=1.0), optax.adamw):
            optimizer = make(1e-2, b1=0.9, b2=0.99, weight_decay=0.1)
            update = jax.jit(optimizer.update)
            params = [jnp.asarray(w) for w in weights]
            state = optimizer.init(params)
            for gradients in steps:
                updates, state = update([jnp.asarray(g) for g in gradients], state, params)
                params = optax.apply_updates(params, updates)
            found.append([np.asarray(p) - w for p, w in zip(params, weights, strict=True)])
    assert deviation(*found) < 4 * len(steps) * EPSILON[dtype]


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("framework", [marked(name) for name in FRAMEWORKS])
def test_adaptivity_0_is_normalised_momentum_sgd(framework: str, scope: str) -> None:
    """The step of `torch.optim.SGD` with momentum and dampening, divided by one number for the model, or for a tensor:
    every entry of the quotient is that number."""
    import torch

    weights = digits.initial_weights(digits.CONVNET, seed=0, dtype="float64")
    options = {"adaptivity": 0.0, "weight_decay": 0.0, "scope": scope}
    data = list(digits.load("float64").batches(10, seed=0))
    with settings(framework, "float64", "cpu"):
        trainer = TRAINERS[framework](weights, options, "cpu")
        zeros = [torch.zeros(w.shape, dtype=torch.float64, requires_grad=True) for w in weights]
        sgd = torch.optim.SGD(zeros, lr=1.0, momentum=0.9, dampening=0.9)
        for step, (images, labels) in enumerate(data, start=1):
            before = trainer.parameters()
            _, gradients = trainer.step(images, labels)
            ours = [p - q for p, q in zip(trainer.parameters(), before, strict=True)]
            start = [p.detach().clone() for p in zeros]
            for p, g in zip(zeros, gradients, strict=True):
                # torch's first momentum is the gradient undamped; ours starts at zero, as damped as any other
                p.grad = torch.tensor(0.1 * g if step == 1 else g)
            sgd.step()
            theirs = [(p - q).detach().numpy() for p, q in zip(zeros, start, strict=True)]
            numbers = [float(np.vdot(a, b) / np.vdot(b, b)) for a, b in zip(ours, theirs, strict=True)]
            assert deviation([n * b for n, b in zip(numbers, theirs, strict=True)], ours) < 1e-12
            largest, smallest = max(numbers), min(numbers)
            if scope == "model":
                assert largest == pytest.approx(smallest, rel=1e-12)
            else:
                assert largest > 2 * smallest
