"""Any optimizer of Keras, stepped by given gradients on given variables; and golden cases replayed by Ada2MS.

For tests, `ada2ms check` and `ada2ms identify`; `Driven` is an `Optimizer` of `ada2ms.conformance`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any, Literal

import keras
import numpy as np

from ada2ms.core import golden
from ada2ms.core.cases import Array, Path, Race, Snapshot, choices, dtypes, initial, named_groups, recorded
from ada2ms.core.hyperparameters import to_arguments
from ada2ms.tf.optimizer import Ada2MS


@contextmanager
def settings(dtype: str, device: str = "cpu") -> Iterator[None]:
    """Keras' default precision and device, as a user of `dtype` sets them, and its backend's.

    Args:
        dtype: "float32" or "float64".
        device: Keras' name of it, such as "cpu" or "gpu:0".
    """
    backend = keras.backend.backend()
    with ExitStack() as stack:
        stack.callback(keras.config.set_floatx, keras.config.floatx())
        stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        # torch would copy variables to its cpu:0
        stack.enter_context(keras.device("cpu:0" if (backend, device) == ("jax", "cpu") else device))
        if backend == "jax":
            import jax

            kind, _, index = device.partition(":")
            stack.enter_context(jax.enable_x64(dtype == "float64"))
            stack.enter_context(jax.default_matmul_precision("highest"))
            stack.enter_context(jax.default_device(jax.devices(kind)[int(index or 0)]))
        if backend == "torch":
            import torch

            stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        yield


def version() -> str:
    """That of Keras, and of its backend."""
    backend = import_module(keras.backend.backend())
    return f"{keras.__version__} on {keras.backend.backend()} {backend.__version__}"


def devices() -> list[str]:
    """Those that Keras' backend sees here, by Keras' names."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        kinds = [device.device_type.lower() for device in tf.config.list_logical_devices()]
    elif backend == "jax":
        import jax

        kinds = [jax.default_backend()]
    else:
        import torch

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kinds = [] if accelerator is None else [{"cuda": "gpu"}.get(accelerator.type, accelerator.type)]
    return ["cpu", *(f"{kind}:0" for kind in dict.fromkeys(kinds) if kind in ("gpu", "tpu", "mps", "xpu"))]


def lacks(device: str, dtype: str) -> str:
    """Why a device cannot compute in a dtype; "" if it can."""
    if device.startswith(("mps", "tpu")) and dtype == "float64":
        return f"{device} has no float64"
    kind, _, index = device.partition(":")
    try:
        with settings(dtype, device):
            if keras.backend.backend() == "tensorflow":  # which would take another device
                import tensorflow as tf

                tf.config.list_logical_devices(kind.upper())[int(index or 0)]
            keras.ops.ones(1)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        return f"there is no {device} ({error})".partition("\n")[0]
    return ""


def paths(device: str, few: Collection[str] | None = None) -> list[Path]:
    """The ways of a step on a device: as `fit` compiles it, and operation by operation; torch compiles nothing."""
    if keras.backend.backend() == "torch":
        return [Path("eager", partial(replay, compiled=False))]
    eager: Literal["few", "none"] = "none" if keras.backend.backend() == "jax" else "few"  # as ada2ms.jax, and slower
    return [
        Path("as fit compiles it", partial(replay, compiled=True), share="once"),
        Path("op by op", partial(replay, compiled=False), share=eager),
    ]


def races(device: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[Race]:
    """A step of Ada2MS beside one of Keras' AdamW, as `fit` compiles them; on torch as they are."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    made = [
        Driven(make, arrays, device=device, compiled=True)
        for make in (Ada2MS, partial(keras.optimizers.AdamW, weight_decay=1e-2))
    ]
    with settings("float32", device):
        gradients = [keras.ops.convert_to_tensor(x) for x in arrays]
    ours, theirs = (partial(run.apply, gradients) for run in made)
    yield Race(paths(device)[0].name, ours, theirs, lambda: [numpy(run.variables[1]) for run in made])


class Driven:
    """An optimizer of Keras that is stepped by gradients in NumPy.

    Args:
        make: returns the optimizer.
        params: initial values.
        dtype: the default precision, and that of the variables.
        dtypes: of each variable, where they differ.
        device: Keras' name of it, such as "cpu" or "gpu:0".
        compiled: steps as `fit` compiles them on the Keras backend in use; on torch, as they are.

    Attributes:
        variables: Keras', in order; they are called variable_0, variable_1 and so on.
        optimizer: what `make` returned, built.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        params: Sequence[Array],
        *,
        dtype: str = "float32",
        dtypes: Sequence[str] | None = None,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        self._dtype, self._device = dtype, device
        with settings(dtype, device):
            self.variables = [
                keras.Variable(p, dtype=kind, name=name)
                for p, kind, name in zip(params, dtypes or [dtype] * len(params), names(len(params)), strict=True)
            ]
            self.optimizer = make()
            self.optimizer.build(self.variables)
            self._apply = compiled_apply(self.optimizer, self.variables) if compiled else self.optimizer.apply

    def step(self, gradients: Sequence[Array | None]) -> None:
        """One step; None is a gradient that is missing. Keras has no step without any gradient, and this does nothing
        then."""
        if all(g is None for g in gradients):
            return
        with settings(self._dtype, self._device):
            self.apply(
                [None if g is None else keras.ops.convert_to_tensor(np.asarray(g, self._dtype)) for g in gradients]
            )

    def apply(self, gradients: list[Any]) -> None:
        """One step by the backend's tensors."""
        self._apply(gradients, self.variables)

    @property
    def params(self) -> list[Array]:
        """The current values, in float64."""
        return [numpy(v) for v in self.variables]

    @property
    def lr(self) -> Any:
        """The learning rate."""
        return self.optimizer.learning_rate

    @lr.setter
    def lr(self, value: float) -> None:
        with settings(self._dtype, self._device):
            self.optimizer.learning_rate = value


def names(count: int) -> list[str]:
    """Those of as many variables."""
    return [f"variable_{i}" for i in range(count)]


def numpy(x: Any) -> Array:
    """In float64."""
    return np.asarray(keras.ops.convert_to_numpy(x), np.float64)


def compiled_apply(optimizer: Any, variables: list[Any]) -> Callable[[list[Any], list[Any]], None]:
    """`optimizer.apply`, compiled as `fit` compiles it on the Keras backend in use; on torch, as it is."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled: Any = tf.function(lambda gradients, given: optimizer.apply(gradients, variables))
        return compiled  # type: ignore[no-any-return]
    if keras.backend.backend() == "jax":
        import jax

        update = jax.jit(optimizer.stateless_apply)

        def apply(gradients: list[Any], _: list[Any]) -> None:
            state = [v.value for v in optimizer.variables]
            moved = update(state, gradients, [v.value for v in variables])
            for kept, values in zip((variables, optimizer.variables), moved, strict=True):
                for variable, value in zip(kept, values, strict=True):
                    variable.assign(value)

        return apply
    return optimizer.apply  # type: ignore[no-any-return]


def replay(case: golden.Case, dtype: str, device: str, compiled: bool | None = None) -> Iterator[Snapshot | None]:
    """Replays a golden case by Ada2MS.

    Args:
        case: any whose groups Keras can state.
        dtype: "float64" or "float32".
        device: Keras' name of it.
        compiled: steps as `fit` compiles them; by default in long cases alone: a thousand steps, one operation at a
            time, take ten seconds.

    Raises:
        NotStated: the groups' learning rates are no multiples of one.
    """
    hyper, groups = named_groups(case, names(len(initial(case))))
    arguments = to_arguments(hyper | choices(case), "keras")
    run = Driven(
        lambda: Ada2MS(case.groups[0].lr[0], **arguments, groups=groups),
        initial(case),
        dtype=dtype,
        dtypes=dtypes(case, dtype),
        device=device,
        compiled=len(case.gradients) > 100 if compiled is None else compiled,
    )
    for i, gradients in enumerate(case.gradients):
        run.lr = case.groups[0].lr[i]
        run.step(gradients)
        yield _snapshot(run, case) if i + 1 in recorded(case) else None


def _snapshot(run: Driven, case: golden.Case) -> Snapshot:
    optimizer = run.optimizer
    slots = {v.path.rpartition("/")[2]: v for v in optimizer.variables}
    # The first variable of each group, by which its global second moment is found.
    first = [sum(len(g.params) for g in case.groups[:i]) for i in range(len(case.groups))]
    moments = [optimizer._grouping.moment_of[i] for i in first]

    def of_groups(x: Any) -> Array:
        return np.broadcast_to(numpy(x), max(moments) + 1)[moments]

    return Snapshot(
        run.params,
        [numpy(v) for v in optimizer._momentums],
        [numpy(v) for v in optimizer._velocities],
        step=[int(t) for t in numpy(slots["steps"])],
        s=(of_groups if case.scope == "model" else numpy)(slots["global_velocity"]).tolist(),
        k=of_groups(slots["global_step"]).astype(int).tolist(),
        skipped=int(numpy(slots["skipped"])),
        compensation=[None if x is None else numpy(x) for x in optimizer._compensations or [None] * len(run.variables)],
    )
