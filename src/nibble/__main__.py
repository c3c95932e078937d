"""`python -m nibble` is the command `nibble`."""

import sys

from nibble.cli import run

if __name__ == "__main__":
    sys.exit(run())
