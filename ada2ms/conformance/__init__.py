"""Does an optimizer compute what it says? For any implementation of the rule, in any framework; NumPy only.

    from ada2ms.conformance import check

    report = check(make)  # make(params, **hyper) -> an object with step(gradients) and params
    print(report)
    assert report.ok

`identify(make)` says what an optimizer computes that need not be Ada2MS. `ada2ms check` does the first for the
installed frameworks, `ada2ms identify` the second for any of their optimizers. docs/conformance.md tells how to read
the vectors from any language.
"""

from ada2ms.conformance.bounds import Deviation
from ada2ms.conformance.identification.identify import identify
from ada2ms.conformance.identification.report import Identification
from ada2ms.conformance.identification.subject import CannotRunError
from ada2ms.conformance.port import Optimizer, Report, check

__all__ = ["CannotRunError", "Deviation", "Identification", "Optimizer", "Report", "check", "identify"]
