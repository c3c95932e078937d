"""One of several processes of a run, as `nibble train` starts them: `python -m nibble.cli.worker
JOB`.

It finds its rank in the environment and its recipe in the job. An error is left to who started it,
which shows one line for the whole run; a bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from nibble.cli import explain
from nibble.errors import NibbleError
from nibble.launch.leaving import leave
from nibble.launch.processes import INTERRUPTED, end_with_parent, report_error
from nibble.launch.supervise import read_job
from nibble.spec.config import Recipe


def main(path: str) -> int:
    """Do the job of a file; returns the exit code."""
    end_with_parent()
    job = read_job(Path(path))
    sys.argv = list(job.typed)  # which the run folder keeps
    try:
        from nibble.cli.training import train_here

        train_here(Recipe.model_validate_json(job.recipe), resume=job.resume)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        line = explain(error)
        if line is None or job.debug:
            traceback.print_exc()
        report_error(error, line or f"{type(error).__name__}: {error}", os.environ)
        return error.exit_code if isinstance(error, NibbleError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(leave(main(sys.argv[1])))
