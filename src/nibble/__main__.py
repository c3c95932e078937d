"""`python -m nibble` is the command `nibble`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
