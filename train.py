"""The fsdp_qlora training command, run by nibble.

    python train.py --train_type qlora --dataset alpaca --batch_size 8 --output_dir qlora_output

Every flag of that script is accepted or refused by name (`--help` lists them). The words become a
recipe, and the recipe is trained as `nibble train` would: this file holds no training code.
"""

from __future__ import annotations

import sys

from nibble.errors import NibbleError
from nibble.launch.leaving import leave


def main(argv: list[str]) -> int:
    """Train; 0, or the exit code of the error that was printed in one line."""
    from nibble.spec import fsdp_flags, fsdp_qlora

    if {"-h", "--help"} & set(argv):
        sys.stdout.write(fsdp_flags.help_text())
        return 0
    try:
        settings = fsdp_qlora.translate(argv)  # answers a mistyped flag before anything is loaded
        from nibble.spec.load import load_recipe

        recipe = load_recipe(None, base=settings)
        from nibble.cli import train_recipe

        train_recipe(recipe)
    except NibbleError as error:
        sys.stderr.write(f"train.py: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(leave(main(sys.argv[1:])))
