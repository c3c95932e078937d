"""`python -m nibble` is the command `nibble`."""

import sys

from nibble.cli import main

if __name__ == "__main__":
    sys.exit(main())
