"""The command line: `ada2ms demo`, `ada2ms compare` and `ada2ms state`, also `python -m ada2ms`."""

from ada2ms.cli.arguments import adaptivity
from ada2ms.cli.main import main

__all__ = ["adaptivity", "main"]
