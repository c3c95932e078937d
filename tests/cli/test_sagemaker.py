"""Jobs of SageMaker: what their words become, and whole ones under the service's own toolkit.

The toolkit is heavy and has no part in nibble. It is taken from where it is installed, or from the
folder that NIBBLE_SAGEMAKER names (pip install --target FOLDER sagemaker-training).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_recipe

from nibble.cli.sagemaker import channel_words, main, read_task, run_folder
from nibble.errors import ConfigError
from nibble.weights.adapter_files import read_adapter_config

ENTRY = "from nibble.cli.sagemaker import main\nraise SystemExit(main())\n"


def environment(root: Path) -> dict[str, str]:
    return {
        "SM_MODEL_DIR": str(root / "model"),
        "SM_OUTPUT_DATA_DIR": str(root / "output" / "data"),
        "SM_HOSTS": '["algo-1"]',
        "SM_CURRENT_HOST": "algo-1",
        "SM_CHANNELS": '["model","training","validation"]',
        "SM_CHANNEL_TRAINING": str(root / "input" / "data" / "training"),
        "SM_CHANNEL_VALIDATION": str(root / "input" / "data" / "validation"),
        "SM_CHANNEL_MODEL": str(root / "input" / "data" / "model"),
    }


def test_channels_and_folders_become_words(tmp_path: Path) -> None:
    words = environment(tmp_path)
    data = tmp_path / "input" / "data"
    assert channel_words(words) == {
        "data.train": str(data / "training"),
        "data.eval": str(data / "validation"),
        "model.path": str(data / "model"),
    }
    assert channel_words({"SM_CHANNEL_TRAIN": "a", "SM_CHANNEL_TRAINING": "b"}) == {
        "data.train": "a"
    }
    assert run_folder(words) == tmp_path / "output" / "data" / "run"
    (tmp_path / "checkpoints").mkdir()
    assert run_folder(words) == tmp_path / "checkpoints", "SageMaker keeps what is there"


def test_hyperparameters_win_over_channels_and_channels_over_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", Path("base"), Path("rows.jsonl"), tmp_path / "run")
    # As the toolkit writes them: str() of what was JSON.
    flags = ["--adapter.kind", "lora", "--adapter.targets", "['q_proj', 'v_proj']",
             "--data.packing", "True", "--learning_rate", "0.0001", "--model.path", "mine",
             "--recipe", str(recipe)]  # fmt: skip
    task = read_task(flags, environment(tmp_path))
    made = task.recipe
    assert made.model.path == "mine"
    assert [source.path for source in made.data.train] == [
        str(tmp_path / "input" / "data" / "training")
    ]
    assert made.adapter.targets == ("q_proj", "v_proj")
    assert made.data.packing is True and made.optim.learning_rate == 1e-4
    assert made.output_dir == str(tmp_path / "output" / "data" / "run")
    assert task.export == "adapter"
    assert read_task([*flags, "--export", "merged"], environment(tmp_path)).export == "merged"
    assert read_task([*flags, "--output_dir", "own"], {}).recipe.output_dir == "own"
    plain = ["--recipe", str(recipe)]
    assert read_task(plain, {}).export == "hf"
    with pytest.raises(ConfigError, match="export=zip is not one of"):
        read_task([*plain, "--export", "zip"], {})


def test_a_wrong_hyperparameter_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "qlora", "--lerning_rate", "1"]) == 2
    _, err = capfd.readouterr()
    assert len(err.splitlines()) == 1 and "lerning_rate" in err


# The toolkit -------------------------------------------------------------------------------------


def toolkit() -> str | None:
    """What the toolkit's own interpreter path needs; None when it is installed."""
    folder = os.environ.get("NIBBLE_SAGEMAKER")
    if importlib.util.find_spec("sagemaker_training") is not None:
        return None
    if folder is None or not (Path(folder) / "sagemaker_training").is_dir():
        pytest.skip("sagemaker-training is not installed, and NIBBLE_SAGEMAKER names no folder")
    return folder


@pytest.fixture
def job(tmp_path: Path, world: Path) -> Path:
    """/opt/ml as SageMaker mounts it for a job with checkpoints."""
    root = tmp_path / "ml"
    for name in ("input/config", "input/data/train", "model", "output/data", "checkpoints"):
        (root / name).mkdir(parents=True)
    shutil.copy(world / "rows.jsonl", root / "input" / "data" / "train" / "rows.jsonl")
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.py").write_text(ENTRY)
    write_recipe(
        source / "recipe.yaml", world / "base", Path("unused.jsonl"), tmp_path / "unused",
        adapter={"kind": "lora", "rank": 4},
    )  # fmt: skip
    hyperparameters = {
        "sagemaker_program": "train.py", "sagemaker_submit_directory": str(source),
        "recipe": "recipe.yaml", "train.max_steps": 400, "train.save_every": 100,
        "place.num_devices": 1,
    }  # fmt: skip
    configs = {
        "hyperparameters": {name: json.dumps(value) for name, value in hyperparameters.items()},
        "inputdataconfig": {"train": {"TrainingInputMode": "File"}},
        "resourceconfig": {
            "current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo",
            "current_instance_type": "local", "current_group_name": "homogeneousCluster",
            "instance_groups": [{"instance_group_name": "homogeneousCluster",
                                 "instance_type": "local", "hosts": ["algo-1"]}],
        },
    }  # fmt: skip
    for name, config in configs.items():
        (root / "input" / "config" / f"{name}.json").write_text(json.dumps(config))
    return root


def start(job: Path) -> subprocess.Popen[str]:
    folder = toolkit()
    paths = [*([folder] if folder else []), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "sagemaker_training.cli.train"],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(job), "SM_STUDIO_LOCAL_MODE": "true",
             "AWS_REGION": "us-east-1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.dist
def test_a_spot_job_is_interrupted_and_goes_on(job: Path) -> None:
    first = start(job)
    until = time.monotonic() + 90
    while not (job / "checkpoints" / "checkpoint-100").exists():
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert list((job / "model").iterdir()) == []

    second = start(job)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 0, out
    assert "going on from" in out
    lines = (job / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 401))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (job / "model").iterdir()
    }
    assert not any(file.is_dir() for file in (job / "model").iterdir())
    assert read_adapter_config(job / "model").rank == 4
    assert (job / "output" / "success").exists()


@pytest.mark.dist
def test_a_job_that_cannot_be_meant_fails_before_it_loads(job: Path) -> None:
    config = job / "input" / "config" / "hyperparameters.json"
    words = json.loads(config.read_text())
    config.write_text(json.dumps({**words, "train.max_steps": json.dumps("many")}))
    process = start(job)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert [line for line in out.splitlines() if line.startswith("nibble:")] == [
        "nibble: train.max_steps=many is not a whole number >= 1 or null"
    ]
    assert (job / "output" / "failure").exists()
