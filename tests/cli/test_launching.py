"""`nibble train` as one process and as several, however they are started, and what ends them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

pytestmark = pytest.mark.dist
NIBBLE = (sys.executable, "-m", "nibble")
TWO = ("place.num_devices=2", "place.kind=ddp")
FOREVER = ("train.max_steps=100000",)
PATIENCE_S = 120


@pytest.fixture(scope="module")
def recipe(world: Path) -> Path:
    """Four rows a process and step; the file names no placement but the CPU."""
    return write_recipe(
        world / "launch.yaml", world / "base", world / "rows.jsonl", world / "unused",
        adapter={"kind": "lora", "rank": 4},
    )  # fmt: skip


def start(*words: object, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **more,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], within_s: float = PATIENCE_S) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        # Gently: those that it started are in sessions of their own.
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still runs after {within_s} s") from None
    return process.returncode, out, err


def metrics(run: Path) -> dict[int, float]:
    """The loss of each whole step so far; every step once."""
    found: dict[int, float] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if "loss" in row:
                assert row["step"] not in found
                found[row["step"]] = row["loss"]
    return found


def await_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not any(at >= step for at in metrics(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        words = Path(f"/proc/{line}/environ").read_bytes().split(b"\0")
        ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
        found.update({rank: int(line) for rank in ranks})
    return found


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("nibble:")]


@pytest.fixture(scope="module")
def alone(world: Path, recipe: Path) -> Path:
    """The run of one process with the same rows a step."""
    run = world / "alone"
    words = ("train.micro_batch_size=8", f"output_dir={run}")
    code, _, err = finish(start(*NIBBLE, "train", recipe, *words))
    assert code == 0, err
    return run


def same(run: Path, alone: Path) -> None:
    wanted = metrics(alone)
    assert metrics(run) == pytest.approx(wanted, abs=1e-5)
    assert sorted(wanted) == [1, 2, 3]
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-3"]


def test_it_starts_its_own_processes(world: Path, recipe: Path, alone: Path) -> None:
    run = world / "two"
    code, out, err = finish(start(*NIBBLE, "train", recipe, *TWO, f"output_dir={run}"))
    assert (code, said(err)) == (0, []), err
    assert out.count("held-out loss") == 3, "one process speaks"
    assert out.count("go on with:") == 1
    assert json.loads((run / "versions.json").read_text())["command"][1:3] == ["train", str(recipe)]
    same(run, alone)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_others_may_start_them(launcher: str, world: Path, recipe: Path, alone: Path) -> None:
    run = world / launcher
    commands = {
        "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        "accelerate": (
            "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
            "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
        ),
    }  # fmt: skip
    command = (sys.executable, "-m", *commands[launcher], "-m", "nibble", "train", str(recipe))
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    code, out, err = finish(start(*command, f"output_dir={run}"))
    assert code == 0, err
    assert out.count("go on with:") == 1
    same(run, alone)


def test_srun_may_start_them(world: Path, recipe: Path, alone: Path) -> None:
    """srun itself is not here; its environment is."""
    run = world / "srun"
    common = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "gpu01",
    }  # fmt: skip
    tasks = [
        start(
            *NIBBLE, "train", recipe, f"output_dir={run}",
            env={**os.environ, **common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    ended = [finish(task) for task in tasks]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[1][1] == "", "only the first task speaks"
    same(run, alone)


def test_a_killed_process_ends_the_run_by_name(world: Path, recipe: Path) -> None:
    run = world / "killed"
    process = start(*NIBBLE, "train", recipe, *TWO, *FOREVER, f"output_dir={run}")
    await_step(run, 2, process)
    os.kill(children(process)[1], signal.SIGKILL)
    began = time.monotonic()
    code, _, err = finish(process, within_s=25)
    assert time.monotonic() - began < 15
    assert code == 1
    assert said(err) == ["nibble: rank 1 was killed by SIGKILL: out of host memory?"], err
    assert "Traceback" not in err


def test_ctrl_c_saves_once_and_the_run_goes_on(world: Path, recipe: Path) -> None:
    run = world / "stopped"
    process = start(*NIBBLE, "train", recipe, *TWO, *FOREVER, f"output_dir={run}")
    await_step(run, 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, out, err = finish(process, within_s=60)
    assert code == 130, err
    assert err.count("SIGINT: finishing this step") == 1 and said(err) == [], err
    assert out.count(f"go on with: nibble train {run} --resume") == 1
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert max(metrics(run)) == step
    words = (f"train.max_steps={step + 2}", "--resume")
    code, out, err = finish(start(*NIBBLE, "train", run, *words))
    assert code == 0, err
    assert f"going on from {checkpoint}" in out
    assert sorted(metrics(run)) == list(range(1, step + 3))


def test_a_lost_process_is_started_again_from_the_last_checkpoint(
    world: Path, recipe: Path, alone: Path
) -> None:
    run = world / "again"
    words = ("train.max_steps=30", "train.save_every=2", "--max-restarts=2")
    process = start(*NIBBLE, "train", recipe, *TWO, *words, f"output_dir={run}")
    await_step(run, 4, process)
    os.kill(children(process)[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, said(err)) == (0, []), err
    assert "starting again (2 restarts left)" in err
    assert "going on from" in out
    assert sorted(metrics(run)) == list(range(1, 31))
    assert metrics(run)[1] == pytest.approx(metrics(alone)[1], abs=1e-5)


def test_what_the_run_refuses_is_one_line(world: Path, recipe: Path) -> None:
    run = world / "refused"
    words = (*TWO, "--max-restarts=3", f"output_dir={run}", "data.train=nothing.jsonl")
    code, _, err = finish(start(*NIBBLE, "train", recipe, *words))
    assert code == 1
    assert len(said(err)) == 1 and "nothing.jsonl" in err, err
    assert "starting again" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "line", "code"),
    [
        (("place.device=cuda", "place.num_devices=64"), "place.num_devices=64", 1),
        (("--nodes", "2"), "either --master HOST:PORT", 2),
        (("place.num_devices=0",), "place.num_devices=0", 2),
    ],
)
def test_usage_errors_come_before_any_process(
    words: tuple[str, ...], line: str, code: int, recipe: Path, world: Path
) -> None:
    program = (
        "import sys, subprocess; from nibble.cli import main\n"
        "def never(*a, **k): raise AssertionError('started a process')\n"
        "subprocess.Popen = never\n"
        "code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    run = f"output_dir={world / 'never'}"
    done = finish(start(sys.executable, "-c", program, "train", recipe, run, *words))
    assert done[0] == code, done[2]
    assert len(done[2].splitlines()) == 1 and line in done[2]
    assert not (world / "never").exists()


# Two machines ------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces that see each other over a pair of virtual cards, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("two machines are made with `ip`, which is not here")
    names = tuple(f"nibble-{os.getpid()}-{i}" for i in range(2))
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            pair = ("type", "veth", "peer", "name", "card", "netns", names[1])
            ip("link", "add", "card", "netns", names[0], *pair)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no leave to make network namespaces: {error.stderr.decode().strip()}")
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "card")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "card", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("how", ["fixed", "rendezvous"])
def test_two_machines_equal_one(
    how: str, machines: tuple[str, str], world: Path, recipe: Path, alone: Path
) -> None:
    run = world / f"machines-{how}"
    meet = {
        "fixed": lambda i: ("--node-rank", i, "--master", "10.77.0.1:29512"),
        "rendezvous": lambda i: ("--rendezvous", "10.77.0.1:29512"),
    }[how]
    started = [
        start(
            "ip", "netns", "exec", name, *NIBBLE, "train", recipe, f"output_dir={run}",
            "--nodes", 2, *meet(i),
        )
        for i, name in enumerate(machines)
    ]  # fmt: skip
    ended = [finish(process) for process in started]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sum(out.count("go on with:") for _, out, _ in ended) == 1
    same(run, alone)
