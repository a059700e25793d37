"""How long a step takes beside the framework's own AdamW, for `ada2ms check --speed`."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

ROUNDS: Final = 21
_TURN: Final = 0.01  # seconds: steps are repeated until a turn takes as long

# 4 million parameters as in a transformer: matrices, and vectors.
SHAPES: Final[list[tuple[int, ...]]] = [(512, 512), (512,), (2048, 512), (2048,), (512, 2048), (512,)] * 2


def pair(ours: Callable[[], Any], theirs: Callable[[], Any], wait: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds a step, medians over interleaved rounds, and the median of the ratio in a round.

    Args:
        ours: a step.
        theirs: one of what it is compared with.
        wait: until the device has done what was asked of it.
    """
    for step in (ours, theirs):  # compiles
        step()
        wait()
    repeat = max(1, round(_TURN / max(_timed(theirs, wait, 1), 1e-6)))
    times = [(_timed(ours, wait, repeat), _timed(theirs, wait, repeat)) for _ in range(ROUNDS)]
    return {
        "ours": statistics.median(a for a, _ in times) / repeat * 1e3,
        "theirs": statistics.median(b for _, b in times) / repeat * 1e3,
        "ratio": statistics.median(a / b for a, b in times),
    }


def _timed(step: Callable[[], Any], wait: Callable[[], Any], repeat: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    wait()
    return time.perf_counter() - start


def lines(framework: str, drive: Any, device: str, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A line for each path that a framework's `drive.races` has."""
    for race in drive.races(device, SHAPES):
        progress(f"{framework} on {device}, {race.path}: speed")
        measured = pair(race.ours, race.theirs, race.wait)
        yield {"framework": framework, "device": device, "path": race.path, **measured}
