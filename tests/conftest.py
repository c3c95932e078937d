"""Every test is offline, single-threaded and away from the user's caches.

Set before torch or a hub library is imported: several processes of tests share few cores, where one
thread each is fastest, and no test may find or leave anything in the home folder.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
CACHE = tempfile.mkdtemp(prefix="nibble-test-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE
os.environ["XDG_CONFIG_HOME"] = os.path.join(CACHE, "config")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    """Inside of it, whatever makes the host wait for the GPU is an error."""

    @contextmanager
    def watched() -> Iterator[None]:
        import torch

        def mode(name: str) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "a prototype feature", said after it was set
                torch.cuda.set_sync_debug_mode(name)

        torch.cuda.synchronize()
        mode("error")
        try:
            yield
        finally:
            mode("default")

    return watched
