"""What real optimizers compute: makes docs/identify-table.md.

    KERAS_BACKEND=tensorflow PYTHONPATH=. python tests/identify_table.py --write [part of a name]

Optimizers of packages that are not installed, and whose name has not this part, are left as the page has them.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

from ada2ms.cli.subjects import load
from ada2ms.conformance import CannotRunError, Identification
from ada2ms.conformance.identification.identify import identify_subject

PAGE = Path(__file__).parents[1] / "docs" / "identify-table.md"
OPTIMIZERS = (
    *(
        f"torch.optim:{name}"
        for name in ("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
    ),
    *(f"torch.optim:{name}" for name in ("SGD", "ASGD", "Rprop", "Adafactor", "Muon", "LBFGS")),
    *(f"keras.optimizers:{name}" for name in ("AdamW", "Adam", "Nadam", "Adamax", "RMSprop", "Adagrad", "Adadelta")),
    *(f"keras.optimizers:{name}" for name in ("SGD", "Lion", "Lamb", "Ftrl", "Adafactor")),
    *(
        f"optax:{name}"
        for name in ("adamw", "adam", "nadam", "amsgrad", "radam", "adamax", "adabelief", "yogi", "lion")
    ),
    *(f"optax:{name}" for name in ("rmsprop", "adagrad", "adadelta", "sgd", "lamb", "lars", "novograd")),
    *(f"pytorch_optimizer:{name}" for name in ("AdamW", "StableAdamW", "AdaBelief", "Lion", "Lamb", "ADOPT", "Adan")),
    *(f"bitsandbytes.optim:{name}" for name in ("AdamW32bit", "AdamW8bit")),
    *("torchao.optim:_AdamW", "torchao.optim:AdamW8bit"),
    *("ada2ms.torch:Ada2MS", "ada2ms.keras:Ada2MS", "ada2ms.jax:ada2ms"),
)
COLUMNS = ("rule", "epsilon", "weight decay", "missing gradient", "16 bits", "explained")


def row(address: str) -> str:
    """The line of an optimizer."""
    try:
        found = identify_subject(load(address))
    except CannotRunError as reason:
        said = str(reason).removeprefix(f"{address.replace(':', '.')} ")
        return f"| `{address}` | | | | | cannot be run: {said.split(' (it')[0][:110]} |"
    cells = [_cell(found, name) for name in COLUMNS]
    return f"| `{address}` | " + " | ".join(cells) + " |"


def _cell(found: Identification, name: str) -> str:
    if name == "explained":
        to = f"to {found.deviation:.0e}" if found.deviation else "to rounding"
        return to if found.explained else f"**no**: {found.unexplained[0]}"
    if not found.explained:
        shown = {"rule": "elementwise", "weight decay": "decay is"}.get(name, "\0")
        return "; ".join(fact.partition(": an")[0].partition(": a f")[0] for fact in found.facts if shown in fact)
    if name == "rule":
        extra = [found.says(x) for x in ("second moment", "Nesterov", "size of the update", "centre of squares")]
        return "; ".join([found.says("rule"), *(x for x in extra if x and x not in ("no", "a mean of squares"))])
    if name == "16 bits":
        parts = [found.says(x) for x in ("bfloat16", "bfloat16 moments", "bfloat16 values") if found.says(x)]
        return "; ".join(part.partition(": ")[0] if part.startswith("cannot run") else part for part in parts)
    open_ = any(x.feature == name and "cannot be told" in x.evidence for x in found.findings)
    return found.says(name).partition(": ")[0] + " (or other: it makes no difference)" * open_


def rows() -> dict[str, str]:
    """Those that the page has, by address."""
    text = PAGE.read_text() if PAGE.exists() else ""
    return {line.split("`")[1]: line for line in re.findall(r"^\| `.*$", text, re.MULTILINE)}


def write(part: str) -> None:
    """Makes the page."""
    there = rows()
    for address in OPTIMIZERS:
        if part in address and find_spec(address.partition(":")[0].partition(".")[0]) is not None:
            there[address] = row(address)
            print(there[address], flush=True)
            _save(there)


def _save(there: dict[str, str]) -> None:
    lines = [
        "# What real optimizers compute",
        "",
        "Each with its defaults, as `ada2ms identify` says it of the versions that `constraints.txt` pins, and of",
        "bitsandbytes 0.50.2 and torchao 0.18.0, on a CPU. Made by",
        "`KERAS_BACKEND=tensorflow PYTHONPATH=. python tests/identify_table.py --write`. bitsandbytes leaves arrays of",
        "fewer than 4096 entries in 32 bits, so that its row of 8 bits shows that path.",
        "",
        "| optimizer | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
        *(there[address] for address in OPTIMIZERS if address in there),
    ]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if "--write" not in sys.argv:
        sys.exit(__doc__)
    write(sys.argv[-1] if sys.argv[-1] != "--write" else "")
