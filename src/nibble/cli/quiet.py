"""What libraries say about themselves is not for the person who runs a command.

Their progress bars, hints and warnings of coming changes would stand between the lines of a run and
inside a streamed answer. Errors still arrive as exceptions. A person who wants the warnings asks
Python for them (`python -W default -m nibble ...`).
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from nibble.errors import NibbleWarning

LIBRARIES = ("bitsandbytes", "datasets", "huggingface_hub", "torch", "transformers")


def quiet_libraries() -> None:
    """Only errors from the libraries, no bars while transformers reads or writes weights; our own
    warnings are notes of one line.

    Called by the commands that load a model; a program that imports nibble keeps its own settings.
    """
    from transformers.utils import logging as transformers_logging

    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", NibbleWarning)
    warnings.showwarning = _note
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del category, filename, lineno, line
    (file or sys.stderr).write(f"note: {message}\n")
