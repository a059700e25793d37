"""Any optimizer of Optax, stepped by given gradients on given parameters; and golden cases replayed by ada2ms.

For tests, `ada2ms check` and `ada2ms identify`; `Driven` is an `Optimizer` of `ada2ms.conformance`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ada2ms.core import golden
from ada2ms.core.cases import (
    Array,
    Path,
    Race,
    Replay,
    Snapshot,
    choices,
    dtypes,
    factors,
    initial,
    named_groups,
    recorded,
)
from ada2ms.jax.optimizer import ada2ms

Make = Callable[[Any], optax.GradientTransformation]


@contextmanager
def settings(dtype: str, device: str = "cpu") -> Iterator[None]:
    """JAX' precision and device, as a user of `dtype` sets them: GPUs may multiply float32 in a shorter format.

    Args:
        dtype: "float32" or "float64".
        device: JAX' name of the platform, such as "cpu", "gpu" or "tpu"; "gpu:1" is its second device.
    """
    platform, _, index = device.partition(":")
    with (
        jax.enable_x64(dtype == "float64"),
        jax.default_matmul_precision("highest"),
        jax.default_device(jax.devices(platform)[int(index or 0)]),
    ):
        yield


def version() -> str:
    """That of JAX, and of Optax."""
    return f"{jax.__version__}, Optax {optax.__version__}"


def devices() -> list[str]:
    """The platforms that this JAX sees here."""
    found = []
    for platform in dict.fromkeys(["cpu", jax.default_backend()]):
        with suppress(RuntimeError):  # JAX_PLATFORMS leaves it out
            jax.devices(platform)
            found.append(platform)
    return found


def lacks(device: str, dtype: str) -> str:
    """Why a device cannot compute in a dtype; "" if it can."""
    if device.startswith("tpu") and dtype == "float64":
        return "a TPU computes float64 in software, to other roundings"
    platform, _, index = device.partition(":")
    there = len(jax.devices(platform))
    return "" if int(index or 0) < there else f"there is no {device}: JAX sees {there} here"


def paths(device: str, few: Collection[str] | None = None) -> list[Path]:
    """The ways of a step on a device; `few` are the ids of the only cases that are going to be run, None for all."""
    return [Path("jit", replay(True, few)), Path("op by op", replay(False), share="few")]


def races(device: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[Race]:
    """A jitted step of Ada2MS beside one of Optax' adamw, whose parameters and state are donated."""
    held: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    with settings("float32", device):
        gradients = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        for name, optimizer in (("ours", ada2ms(1e-3)), ("theirs", optax.adamw(1e-3, weight_decay=1e-2))):
            params = [jnp.ones(shape) for shape in shapes]
            held[name], steps[name] = (params, optimizer.init(params)), jitted(optimizer)

    def step(name: str) -> None:
        held[name] = steps[name](*held[name], gradients)

    yield Race("jit", partial(step, "ours"), partial(step, "theirs"), partial(jax.block_until_ready, held))


def jitted(optimizer: optax.GradientTransformation) -> Any:
    """A step from parameters, state and gradients to parameters and state."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


class Together:
    """Optimizers of Optax, each on parameters of its own, that are stepped in one program.

    JAX compiles a dozen of them as one in half the time that programs of their own take.

    Args:
        makes: each gets the learning rate, traced if compiled, and returns an optimizer.
        params: initial values, for each.
        dtypes: of each parameter, for each.
        dtype: of the gradients; with "float64", JAX computes in it.
        device: JAX' name of it.
        compiled: by `jax.jit`.

    Attributes:
        runs: the parameters and the state, of each.
    """

    def __init__(
        self,
        makes: Sequence[Make],
        params: Sequence[Sequence[Array]],
        dtypes: Sequence[Sequence[str]],
        *,
        dtype: str,
        device: str,
        compiled: bool,
    ) -> None:
        self._dtype, self._device = dtype, device

        def step(runs: list[Any], lrs: list[float], gradients: list[Any]) -> list[Any]:
            moved = []
            for make, (params, state), lr, given in zip(makes, runs, lrs, gradients, strict=True):
                updates, state = make(lr).update(given, state, params)
                params = [p if u is None else optax.apply_updates(p, u) for p, u in zip(params, updates, strict=True)]
                moved.append((params, state))
            return moved

        with settings(dtype, device):
            arrays = [
                [jnp.asarray(p, kind) for p, kind in zip(*each, strict=True)]
                for each in zip(params, dtypes, strict=True)
            ]
            self.runs = [(given, make(1.0).init(given)) for make, given in zip(makes, arrays, strict=True)]
            self._step = jax.jit(step) if compiled else step

    def step(self, lrs: list[float], gradients: Sequence[Sequence[Array | None]]) -> None:
        """One step of each, with its learning rate and gradients; None is a gradient that is missing."""
        with settings(self._dtype, self._device):
            given = [[None if g is None else jnp.asarray(g, self._dtype) for g in each] for each in gradients]
            self.runs = self._step(self.runs, lrs, given)


class Driven:
    """An optimizer of Optax that is stepped by gradients in NumPy.

    Args:
        make: gets the learning rate (or ignores it), and returns the optimizer.
        params: initial values; the tree of parameters is a list.
        dtype: of the parameters and gradients; with "float64", JAX computes in it.
        dtypes: of each parameter, where they differ.
        device: JAX' name of it, such as "cpu", "gpu:1" or "tpu".
        compiled: by `jax.jit`.

    Attributes:
        lr: the learning rate of the next step, which may be set between steps.
    """

    def __init__(
        self,
        make: Make,
        params: Sequence[Array],
        *,
        lr: float = 1e-3,
        dtype: str = "float32",
        dtypes: Sequence[str] | None = None,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        self.lr = lr
        kinds = dtypes or [dtype] * len(params)
        self._run = Together([make], [params], [kinds], dtype=dtype, device=device, compiled=compiled)

    def step(self, gradients: Sequence[Array | None]) -> None:
        """One step; None is a gradient that is missing."""
        self._run.step([self.lr], [gradients])

    @property
    def params(self) -> list[Array]:
        """The current values, in float64."""
        return [np.asarray(p, np.float64) for p in self._run.runs[0][0]]

    @property
    def state(self) -> Any:
        """Optax' state."""
        return self._run.runs[0][1]


CASES_OF_A_PROGRAM = 12


def replay(compiled: bool, few: Collection[str] | None = None) -> Replay:
    """Replays golden cases by ada2ms, if compiled a dozen together: of all cases, or of `few` by their ids."""

    def run(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        _arguments(case)  # raises NotStated for a case that has none
        yield from _snapshots(program_of(case, few) if compiled else (case.id,), dtype, device, compiled)[case.id]

    return run


def program_of(case: golden.Case, few: Collection[str] | None = None) -> tuple[str, ...]:
    """The cases, all or of a few, that are compiled with this one: as many steps, and gradients missing in the same
    places."""

    def pattern(of: golden.Case) -> list[list[bool]]:
        return [[g is None for g in gradients] for gradients in of.gradients]

    among = [other for other in golden.load() if few is None or other.id in few]
    alike = [other.id for other in among if factors(other) is not None and pattern(other) == pattern(case)]
    first = alike.index(case.id) // CASES_OF_A_PROGRAM * CASES_OF_A_PROGRAM
    return tuple(alike[first : first + CASES_OF_A_PROGRAM])


def _arguments(case: golden.Case) -> dict[str, Any]:
    """Those of `ada2ms`. The parameters are a list, whose leaves are called 0, 1 and so on."""
    hyper, groups = named_groups(case, [str(i) for i in range(len(initial(case)))])
    return {**hyper, **choices(case), "groups": groups}


@cache
def _snapshots(ids: tuple[str, ...], dtype: str, device: str, compiled: bool) -> dict[str, list[Snapshot | None]]:
    """What each of the cases, stepped together, comes to."""

    def maker(case: golden.Case) -> Make:
        return lambda lr: ada2ms(lr, **_arguments(case))

    cases = [case for case in golden.load() if case.id in ids]
    together = Together(
        [maker(case) for case in cases],
        [initial(case) for case in cases],
        [dtypes(case, dtype) for case in cases],
        dtype=dtype,
        device=device,
        compiled=compiled,
    )
    found: dict[str, list[Snapshot | None]] = {case.id: [] for case in cases}
    for i in range(len(cases[0].gradients)):
        together.step([case.groups[0].lr[i] for case in cases], [case.gradients[i] for case in cases])
        for case, run in zip(cases, together.runs, strict=True):
            found[case.id].append(_snapshot(case, *run) if i + 1 in recorded(case) else None)
    return found


def _snapshot(case: golden.Case, params: Any, state: Any) -> Snapshot:
    count, mu, nu, s, steps = (optax.tree.get(state, name) for name in ("count", "mu", "nu", "s", "steps"))
    sizes = [len(group.params) for group in case.groups]
    first = np.cumsum([0, *sizes[:-1]])  # the position of each group's first parameter
    of_each = [float(x) for x in np.broadcast_to(np.asarray(s, np.float64).ravel(), sum(sizes))]
    arrays = [[np.asarray(x, np.float64) for x in tree] for tree in (params, mu, nu)]
    return Snapshot(
        arrays[0],
        arrays[1],
        arrays[2],
        step=[int(t) for t in steps],
        s=[of_each[i] for i in first] if case.scope == "model" else of_each,
        k=[int(count)] * len(case.groups),
        skipped=int(optax.tree.get(state, "skipped", 0)),
        compensation=[None if x is None else np.asarray(x, np.float64) for x in state.compensation or []],
    )
