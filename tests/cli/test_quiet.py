"""What a command keeps transformers from importing, and gives back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")

PROGRAM = """
import json, sys
from nibble.cli.quiet import UNUSED, spare_imports
spare_imports()
from transformers import utils
from transformers.generation import candidate_generator
from transformers.loss import loss_utils
told = {"known": [utils.is_hqq_available(), utils.is_scipy_available(),
                  utils.is_sklearn_available(), utils.is_torchvision_available()],
        "loaded": [name for name in UNUSED if name in sys.modules]}
import sklearn.metrics
told["later"] = sklearn.metrics.__name__
print(json.dumps(told))
"""


def test_transformers_leaves_packages_out_that_others_can_import_later() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"known": [False, False, False, False], "loaded": [], "later": "sklearn.metrics"}


def test_what_is_imported_already_stays() -> None:
    program = "import sklearn; " + PROGRAM.replace("import sklearn.metrics\n", "")
    program = program.replace('told["later"] = sklearn.metrics.__name__', "")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["known"][2] is True
    assert told["loaded"] == ["scipy", "sklearn"]
