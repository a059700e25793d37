"""Traces: what a run did, step by step, so that two runs can be compared, in whichever frameworks.

`sketch.py` is what remains of a tensor (`native.py`: the same by C++, for large models), `file.py` how a trace is
stored, `model.py` what it holds (`parts.py`: of arrays that are several parameters elsewhere), and `writer.py` what the
recorders of all frameworks share. `walk.py` says where two runs part, by `pair.py`, which lays them side by side, and
by a file for each stage: `data.py`; `causes.py` for values, losses and gradients, with `sums.py` for gradients that are
sums of what is known; `places.py` for where in the forward pass, by `outputs.py`, which is what remains of activations;
`statistics.py` for what moves and is no parameter; `settings.py` for hyperparameters; `updates.py` for updates. Which
dialect of the catalogue, `ada2ms.core.dialects`, a run speaks is found by `explain.py` from what `series.py` takes from
a trace, for each parameter by `speech.py`, with numbers that nobody told by `numbers.py`. `alone.py` judges one run
alone, and `resumed.py` makes one run of two. What is said is a `Verdict`.
"""

from ada2ms.core.trace.alone import judge
from ada2ms.core.trace.file import TraceError
from ada2ms.core.trace.model import Parameter, Step, Trace
from ada2ms.core.trace.resumed import resumed
from ada2ms.core.trace.verdict import Verdict
from ada2ms.core.trace.walk import diff
from ada2ms.core.trace.writer import Writer

__all__ = ["Parameter", "Step", "Trace", "TraceError", "Verdict", "Writer", "diff", "judge", "resumed"]
