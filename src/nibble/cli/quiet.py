"""What libraries say about themselves is not for the person who runs a command, and what they
would import for others is not worth that person's wait.

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
UNUSED = ("hqq", "scipy", "sklearn", "torchvision")
"""What transformers imports where it is installed, for pictures and boxes found in them, its own
quantised caches and guesses of a smaller model: one to two seconds of every start."""


def quiet_libraries() -> None:
    """Only errors from the libraries, no bars while transformers reads or writes weights; our own
    warnings are notes of one line.

    Called by the commands that load a model; a program that imports nibble keeps its own settings.
    """
    spare_imports()
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


def spare_imports() -> None:
    """Let transformers find that `UNUSED` packages are absent, which it asks once and remembers.

    A module of None is Python's word for one that cannot be imported. They are hidden while
    transformers asks and not after: whoever needs one later imports it.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        from transformers import utils

        for is_available in (
            utils.is_hqq_available,
            utils.is_scipy_available,
            utils.is_sklearn_available,
            utils.is_torchvision_available,
        ):
            is_available()
    finally:
        for name in hidden:
            del sys.modules[name]


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
