"""Words to calls.

`main` is the only place that turns errors into lines and exit codes: 0 done, 1 a NibbleError, 2 a
usage or recipe error, 130 interrupted. torch and transformers are imported inside the commands that
need them, so `--help` and every usage error answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nibble.errors import NibbleError

if TYPE_CHECKING:
    from nibble.cli.launching import Start
    from nibble.spec.config import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from nibble.cli.app import app

    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    try:
        app(args=words, prog_name="nibble", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:
        if debug:
            raise
        line = explain(error)
        if line is None:
            raise
        print(f"nibble: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, NibbleError) else 1
    except KeyboardInterrupt:
        print("nibble: interrupted", file=sys.stderr)
        return 130
    return 0


def run() -> int:
    """What the command `nibble` is: `main`, and the end of the process where it needs care."""
    from nibble.launch.leaving import leave

    return leave(main())


def explain(error: Exception) -> str | None:
    """One line for what is not a bug: nibble's own errors, a full disk, a closed pipe."""
    if isinstance(error, NibbleError):
        return " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):
        # The reader went away (`nibble recipes | head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "output was closed"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some space and run the same command again"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}: choose another folder or change its rights"
    return None


def train_recipe(recipe: Recipe, *, start: Start | None = None) -> None:
    """Plan, train on all devices and say how to go on: what `nibble train` and train.py do."""
    from nibble.cli.launching import Start
    from nibble.cli.launching import train_recipe as run

    run(recipe, start or Start())
