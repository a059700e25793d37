"""The golden vectors by one path of one framework on one device: a row of `ada2ms check`."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ada2ms.conformance.bounds import bound_in_epsilons, deviations
from ada2ms.conformance.known import variants
from ada2ms.core import golden
from ada2ms.core.cases import NotStated, Path, precisions

FEW: Final = 3  # cases of a path that takes longest
_SHOWN: Final = 3  # cases of a row that are off

Progress = Callable[[str], None]


@dataclass
class Row:
    """What came of the vectors by one path in one precision.

    Attributes:
        framework, version, device, path, dtype: of what was run.
        cases: how many were run.
        of: how many there are in this precision.
        worst: the largest deviation in epsilons, with float32 in epsilons a step; None if nothing was run.
        bound: how large it may be.
        seconds: that it took.
        off: what is wrong, the first few of it; empty where all is right.
        wrong: how many cases are off.
        note: why it, or some cases, were not run.
    """

    framework: str
    version: str
    device: str
    path: str
    dtype: str
    cases: int = 0
    of: int = 0
    worst: float | None = None
    bound: float = 0.0
    seconds: float = 0.0
    off: list[str] = field(default_factory=list)
    wrong: int = 0
    note: str = ""

    @property
    def ran(self) -> bool:
        return self.cases > 0

    def data(self) -> dict[str, Any]:
        """As plain data, for JSON, which has no infinity."""
        worst = self.worst if self.worst is None or math.isfinite(self.worst) else None
        return asdict(self) | {"worst": worst}


def chosen(path: Path, dtype: str, everything: bool) -> list[golden.Case]:
    """All cases, or those that together tell every known wrong variant, or a few of these, as the path says."""
    if everything or path.share == "all":
        return list(golden.load())
    few = path.share == "few" or (path.share == "once" and dtype == "float64")
    cover = list(variants()["cover"])
    ids = [] if path.share == "none" else cover[:FEW] if few else cover
    return [case for case in golden.load() if case.id in ids]


def run(row: Row, path: Path, everything: bool, progress: Progress = lambda _: None) -> Row:
    """Fills a row by running the cases."""
    cases = [case for case in chosen(path, row.dtype, everything) if row.dtype in precisions(case)]
    row.of = sum(row.dtype in precisions(case) for case in golden.load())
    row.bound = bound_in_epsilons(row.dtype)
    if path.replay is None:
        row.note = path.reason
        return row
    if not cases:
        row.note = "takes long; --all runs it"
        return row
    start, unstated, reason, worst = time.perf_counter(), 0, "", 0.0
    for i, case in enumerate(cases):
        if i % 10 == 0:
            progress(f"{row.framework} on {row.device}, {path.name}, {row.dtype}: {i} of {len(cases)} cases")
        try:
            epsilons, wrong = _deviation(case, path, row)
        except NotStated as error:
            unstated, reason = unstated + 1, str(error)
            continue
        row.cases += 1
        worst = max(worst, epsilons)
        if wrong:
            row.wrong += 1
            row.off += [wrong] if len(row.off) < _SHOWN else []
    row.worst = worst if row.cases else None
    row.seconds = time.perf_counter() - start
    row.note = f"{unstated} cases that it cannot state: {reason}" if unstated else ""
    return row


def _deviation(case: golden.Case, path: Path, row: Row) -> tuple[float, str]:
    """The largest deviation in epsilons, and what is wrong."""
    assert path.replay is not None
    worst = 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gradients that are missing, which is meant
            for found in deviations(case, path.replay(case, row.dtype, row.device), row.dtype):
                if not found.ok:
                    return (max(worst, found.epsilons) if not found.reason else math.inf), str(found)
                worst = max(worst, found.epsilons)
    except NotStated:
        raise
    except Exception as error:  # of the framework, whatever it is: the other cases are run too
        return math.inf, f"{case.id}: raised {type(error).__name__}: {error}".partition("\n")[0]
    return worst, ""


def rows(
    framework: str, drive: Any, device: str, dtypes: Sequence[str], everything: bool, progress: Progress
) -> Iterator[Row]:
    """Every path on a device.

    Args:
        framework: as the rows call it.
        drive: the backend's room of that name.
        device: the framework's name of it.
        dtypes: the precisions to run in.
        everything: whether to run all cases by all paths.
        progress: told what is being run.
    """
    for path in drive.paths(device, None if everything else variants()["cover"]):
        for dtype in dtypes:
            row = Row(framework, drive.version(), device, path.name, dtype)
            if reason := drive.lacks(device, dtype):
                row.note = reason
                yield row
            else:
                yield run(row, path, everything, progress)
