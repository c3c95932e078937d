"""`nibble train` on two GPUs through NCCL: who starts the processes, and what ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_recipe
from test_launching import (  # fmt: skip
    FOREVER,
    NIBBLE,
    PATIENCE_S,
    await_step,
    finish,
    metrics,
    said,
    start,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def recipe(world: Path) -> Path:
    """Four rows a process and step; the file names no placement at all."""
    return write_recipe(
        world / "gpus.yaml", world / "base", world / "rows.jsonl", world / "unused",
        adapter={"kind": "lora", "rank": 4}, place={"device": "auto"},
    )  # fmt: skip


SAY_WHO = """
import os, sys
if "nibble.cli.worker" in sys.orig_argv:
    path = os.path.join(os.environ["PIDS"], os.environ["RANK"])
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.replace(path + ".part", path)
"""


def telling(folder: Path) -> dict[str, str]:
    """An environment in which each process of a run leaves its id in `folder`, by its rank."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SAY_WHO)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "PIDS": str(folder)}


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("[0-9]"))]


def await_others(process: subprocess.Popen[str], folder: Path, before: list[int]) -> None:
    """Until all processes are new ones."""
    until = time.monotonic() + PATIENCE_S
    while set(pids(folder)) & set(before):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_it_takes_all_gpus_by_itself_and_those_of_torchrun(world: Path, recipe: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node=2", "-m", "nibble")  # fmt: skip
    commands = {
        "one": (*NIBBLE, "train", recipe, "place.kind=single", "train.micro_batch_size=8"),
        "itself": (*NIBBLE, "train", recipe),
        "torchrun": (*torchrun, "train", recipe),
    }
    started = {
        name: start(*words, f"output_dir={world / f'gpus-{name}'}")
        for name, words in commands.items()
    }
    for name, process in started.items():
        code, out, err = finish(process)
        assert code == 0, (name, err)
        assert out.count("go on with:") == 1, name
    alone = metrics(world / "gpus-one")
    assert sorted(alone) == [1, 2, 3]
    for name in ("itself", "torchrun"):
        # One process of four rows would learn from others than these eight.
        assert metrics(world / f"gpus-{name}") == pytest.approx(alone, abs=1e-4), name


def test_a_killed_rank_costs_a_restart_or_ends_the_run(world: Path, recipe: Path) -> None:
    run = world / "gpus-killed"
    words = ("train.save_every=10", "--max-restarts=1", f"output_dir={run}")
    ids = world / "gpus-ids"
    process = start(*NIBBLE, "train", recipe, *FOREVER, *words, env=telling(ids))
    await_step(run, 12, process)
    before = pids(ids)
    assert len(before) == 2, "a process for each GPU"
    os.kill(before[1], signal.SIGKILL)
    await_others(process, ids, before)
    await_step(run, max(metrics(run)) + 12, process)
    os.kill(pids(ids)[0], signal.SIGKILL)
    began = time.monotonic()
    code, out, err = finish(process, within_s=30)
    assert time.monotonic() - began < 20
    assert code == 1
    assert "rank 1 was killed by SIGKILL" in err and "starting again (1 restart left)" in err
    assert said(err)[-1] == "nibble: rank 0 was killed by SIGKILL: out of host memory?", err
    assert "Traceback" not in err and "going on from" in out
    last = max(int(folder.name.partition("-")[2]) for folder in run.glob("checkpoint-*"))
    words = (f"train.max_steps={last + 2}", "--resume")
    code, out, err = finish(start(*NIBBLE, "train", run, *words))
    assert code == 0, err
    assert f"going on from {run / f'checkpoint-{last}'}" in out
    assert sorted(metrics(run)) == list(range(1, last + 3))


def test_ctrl_c_saves_once_and_the_run_goes_on(world: Path, recipe: Path) -> None:
    run = world / "gpus-stopped"
    process = start(*NIBBLE, "train", recipe, *FOREVER, f"output_dir={run}")
    await_step(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = finish(process, within_s=60)
    assert code == 130, err
    assert said(err) == [] and "Traceback" not in err, err
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert max(metrics(run)) == step
    words = (f"train.max_steps={step + 2}", "--resume")
    code, out, err = finish(start(*NIBBLE, "train", run, *words))
    assert code == 0, err
    assert f"going on from {checkpoint}" in out
