"""`python -m ada2ms` is the command `ada2ms`."""

import sys

from ada2ms.cli import main

sys.exit(main())
