"""Does an optimizer compute what it says? For any implementation of the rule, in any framework; NumPy only.

    from ada2ms.conformance import check

    report = check(make)  # make(params, **hyper) -> an object with step(gradients) and params
    print(report)
    assert report.ok

`ada2ms check` does this for the installed frameworks. docs/conformance.md tells how to read the vectors from any
language.
"""

from ada2ms.conformance.bounds import Deviation
from ada2ms.conformance.port import Optimizer, Report, check

__all__ = ["Deviation", "Optimizer", "Report", "check"]
