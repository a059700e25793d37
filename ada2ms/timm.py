"""Ada2MS in timm's registry of optimizers: importing this module registers the name "ada2ms".

    import ada2ms.timm
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, "ada2ms", lr=1e-3, weight_decay=0.05, adaptivity=0.75)

timm's own train.py, and any other script that does not import it, is run through this module:

    python -m ada2ms.timm train.py --opt ada2ms --opt-kwargs adaptivity=0.75 max_norm=1.0
    torchrun --nproc_per_node 8 -m ada2ms.timm train.py --opt ada2ms
"""

import runpy
import sys
from pathlib import Path
from typing import Final

from ada2ms._extras import require

try:
    require("timm", "timm")
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(missing, file=sys.stderr)
    sys.exit(2)

import timm

try:
    from timm.optim._optim_factory import OptimInfo, default_registry  # timm has no public way to register a name
except ImportError as error:
    raise ImportError(
        f"ada2ms.timm needs timm 1.0.12 or later, with its registry of optimizers, not timm {timm.__version__}: "
        "pip install 'ada2ms[timm]'",
        name="timm",
    ) from error

from ada2ms.torch import Ada2MS

NAME: Final = "ada2ms"

if NAME not in default_registry.list_optimizers():  # timm warns about a second registration
    default_registry.register(
        OptimInfo(
            name=NAME,
            opt_class=Ada2MS,
            description="Ada2MS, between AdamW (adaptivity 1) and momentum SGD (adaptivity 0)",
            has_betas=True,
        )
    )


def main() -> None:
    """Runs the script that the first argument names as `python` runs it, with the other arguments as its own."""
    del sys.argv[0]
    if not sys.argv:
        sys.exit("Usage: python -m ada2ms.timm SCRIPT [ARGUMENT ...]")
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
