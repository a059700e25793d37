"""Traces: what a run did, step by step, so that two runs can be compared, in whichever frameworks.

`sketch.py` is what remains of a tensor, `file.py` how a trace is stored, `model.py` what it holds, and `writer.py` what
the recorders of all frameworks share. `walk.py` says where two runs part, by `pair.py`, which lays them side by side,
`data.py` and `causes.py`, which name what differs, and `explain.py`, which finds the dialect of an optimizer in the
catalogue, `ada2ms.core.dialects`. `alone.py` does that for one run alone. What they say is a `Verdict`.
"""

from ada2ms.core.trace.alone import judge
from ada2ms.core.trace.file import TraceError
from ada2ms.core.trace.model import Parameter, Step, Trace
from ada2ms.core.trace.verdict import Verdict
from ada2ms.core.trace.walk import diff
from ada2ms.core.trace.writer import Writer

__all__ = ["Parameter", "Step", "Trace", "TraceError", "Verdict", "Writer", "diff", "judge"]
