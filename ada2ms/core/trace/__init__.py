"""Traces: what a run did, step by step, so that two runs can be compared, in whichever frameworks.

`sketch.py` is what remains of a tensor, `file.py` how a trace is stored, `model.py` what it holds, and `writer.py` what
the recorders of all frameworks share.
"""

from ada2ms.core.trace.file import TraceError
from ada2ms.core.trace.model import Parameter, Step, Trace
from ada2ms.core.trace.writer import Writer

__all__ = ["Parameter", "Step", "Trace", "TraceError", "Writer"]
