"""The command line, `ada2ms` or `python -m ada2ms`: a module for each command."""

from ada2ms.cli.arguments import adaptivity
from ada2ms.cli.main import main

__all__ = ["adaptivity", "main"]
