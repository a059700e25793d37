"""Every backend behind one face: runs golden cases, and shows what came of them. The code is the package's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ada2ms.conformance import rule
from ada2ms.core import golden
from ada2ms.core.cases import NotStated, Replay, Snapshot
from support import device_name, require_device


def in_tests(framework: str, replay: Callable[[], Replay]) -> Replay:
    """A replay that skips where the device is missing, or the case cannot be stated; imported when it is run."""

    def run(case: golden.Case, dtype: str, device: str) -> Iterator[Snapshot | None]:
        require_device(framework, device)
        try:
            yield from replay()(case, dtype, device_name(framework, device))
        except NotStated as reason:
            pytest.skip(str(reason))

    return run


def torch_replay(**options: Any) -> Replay:
    def replay() -> Replay:
        from ada2ms.torch import drive

        return drive.replay(**options)

    return in_tests("torch", replay)


def jax_replay(jit: bool) -> Replay:
    def replay() -> Replay:
        from ada2ms.jax import drive

        return drive.replay(compiled=jit)

    return in_tests("jax", replay)


def keras_replay() -> Replay:
    from ada2ms.tf import drive

    return drive.replay


REPLAYS: dict[str, Replay] = {
    "numpy": rule.replay,
    "torch-forloop": torch_replay(foreach=False),
    "torch-foreach": torch_replay(foreach=True),
    "torch-fused": torch_replay(fused=True),
    "jax-eager": jax_replay(jit=False),
    "jax-jit": jax_replay(jit=True),
    "keras": in_tests("keras", keras_replay),
}
