"""The optimizer comparison, as `ada2ms compare` does it; docs/comparison.md has its protocol and results.

python benchmarks/compare.py [--smoke] [--out FOLDER]
"""

import sys

from ada2ms.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
