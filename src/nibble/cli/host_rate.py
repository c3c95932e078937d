"""What a kernel of a step costs the host, by steps of a small model that do nothing but launch.

A plan counts a step's work for the host in bare launches (spec/counting.py), and a machine's row
says what one takes. Timing a launch alone would miss what surrounds it in a step, Python and
autograd above all, of which hosts are slow or fast in their own ways. So a Llama of six thin
layers is trained by `nibble.run.train` on rows of LENGTH bytes, where no kernel takes as long as
its launch, and the median step is divided by its planned launches.

Costs some seconds, most of them compiling kernels that a machine sees for the first time, and a
hundred MB in a temporary folder.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from nibble.errors import PlacementError
from nibble.run import train
from nibble.spec.arch import from_config
from nibble.spec.builtin_models import config_of
from nibble.spec.config import Recipe
from nibble.spec.hardware import hardware
from nibble.spec.plan import plan

MODEL, LENGTH = "builtin:llama-35m", 64


def seconds_per_launch(device: str, *, precision: str, steps: int) -> float:
    """Host seconds of a bare launch, as steps on `device` (cuda, cuda:1) spend them.

    Raises PlacementError when the steps could not be made, KeyboardInterrupt on Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="nibble-calibrate-") as folder:
        made = recipe(Path(folder), device=device, precision=precision, steps=steps)
        outcome = train(made, stream=io.StringIO()).outcome
        if outcome.interrupted:
            raise KeyboardInterrupt
        lines = (Path(made.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times: list[float] = [line["step_s"] for line in map(json.loads, lines) if "step_s" in line]
    if not times:
        raise PlacementError(f"{device}: no step of the small model was measured")
    return statistics.median(times[len(times) // 2 :]) / planned_launches(made)


def recipe(folder: Path, *, device: str, precision: str, steps: int) -> Recipe:
    """The small model's recipe, and its rows in `folder`."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "a" * 4 * LENGTH}) + "\n" for _ in range(8)))
    return Recipe.model_validate(
        {
            "model": {"path": MODEL, "tokenizer": "builtin:bytes", "from_scratch": True},
            "adapter": {"kind": "none"},
            "data": {"train": [{"path": str(rows)}], "max_length": LENGTH},
            "train": {
                "max_steps": steps,
                "precision": precision,
                "activation_checkpointing": "none",
                "cuda_graphs": False,
            },
            "report": {"sinks": []},
            "place": {"kind": "single", "device": device},
            "output_dir": str(folder / "run"),
        }
    )


def planned_launches(made: Recipe) -> float:
    """A step's work for the host, in bare launches."""
    architecture = from_config(config_of(MODEL))
    # Launches alone are read, so any row does whose launch takes a second.
    unit = replace(hardware("h200"), launch_s=1.0)
    speed = plan(made, architecture=architecture, hardware=unit, on_cpu=False).speed
    assert speed is not None, "the card is known"
    return speed.launches_s
