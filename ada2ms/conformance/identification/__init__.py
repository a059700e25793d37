"""What does an optimizer compute? Any optimizer is stepped by designed gradients, and its updates are explained.

`experiments.py` has the gradients, `subject.py` what is asked of an optimizer, `run.py` what it did, `fit.py` how well
a dialect of `ada2ms.core.dialects` explains it, `search.py` finds the one that does, `measure.py` what the numbers are,
`precision.py` looks at 16 bits, and `facts.py` at what needs no dialect. `findings.py` and `report.py` say it in words,
and `identify.py` does one after the other.
"""
