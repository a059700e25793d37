"""Wrong variants of the rule that are known, and the golden cases that tell them from it."""

import json
from functools import cache
from importlib.resources import files


@cache
def variants() -> dict[str, dict[str, list[str]]]:
    """What the cases tell from the rule, as `tests/variants.py` of the repository has found it.

    Under "named", by case, the known wrong variants that it is there to tell. Under "cover", by case, those that it
    tells of a few short cases that tell them all.
    """
    file = files("ada2ms.conformance") / "variants.json"
    found: dict[str, dict[str, list[str]]] = json.loads(file.read_text(encoding="utf-8"))
    return found
