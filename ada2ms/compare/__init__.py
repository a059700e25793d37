"""The optimizer comparison: one protocol for all, resumable, on data that ships or is made here.

`protocol.py` says which runs there are and in which order, and is what to read first; `optimizers.py`, `data.py` and
`models.py` are what is compared, on what; `train.py` does one run; `runner.py` does them all, and records each;
`report.py` turns the records into tables and pictures. `study.py` is the protocol and the rule by which the default
adaptivity is chosen, and `verdict.py` its report.
"""
