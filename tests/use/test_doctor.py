"""Every judgement of the doctor on facts that cause it, and the facts of this very machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nibble.spec.units import GIB, MIB
from nibble.use import doctor
from nibble.use.doctor import EXTRAS, REQUIRED, Finding, diagnose, examine
from nibble.use.machine import Facts, Folder, Gpu, PackedCache, card_names, collect

GPU = Gpu(
    index=0,
    name="NVIDIA H200",
    total_bytes=140 * GIB,
    free_bytes=139 * GIB,
    capability=(9, 0),
)
VERSIONS: dict[str, str | None] = {
    **{name: ".".join(str(part) for part in least) + ".0" for name, least in REQUIRED.items()},
    **{d: "9.9" for row in EXTRAS.values() for d in row[1]},
    "triton": "3.6.0",
}
WELL = Facts(
    python=(3, 12, 3),
    system="Linux x86_64",
    versions=VERSIONS,
    torch_cuda="13.0",
    driver="580.159.04",
    gpus=(GPU,),
    compiler="/usr/bin/cc",
    bitsandbytes_builds=("128", "130"),
    folders=(Folder(role="runs", path="runs", free_bytes=90 * GIB, is_writable=True),),
    num_cpus=16,
    host_total_bytes=128 * GIB,
    host_free_bytes=100 * GIB,
    shared_free_bytes=64 * GIB,
    locked_limit_bytes=None,
    open_files=65536,
    environment={},
)


def bad(**changes: Any) -> list[Finding]:
    return [f for f in diagnose(replace(WELL, **changes)) if f.status != "ok"]


def test_a_good_machine_has_nothing_to_say() -> None:
    findings = diagnose(WELL)
    assert [f for f in findings if f.status != "ok" or f.advice] == []
    text = " ".join(f.text for f in findings)
    assert "NVIDIA H200, 140.00 GiB" in text and "driver 580.159.04" in text
    assert {f.name for f in findings} >= {"python", "torch", "gpu 0", "triton", "memory", "hub"}


@pytest.mark.parametrize(
    ("num_bases", "num_bytes", "text"),
    [
        (0, 0, r"^empty, /c/packed \(quant.cache; NIBBLE_CACHE moves it\)$"),
        (1, 5 * GIB, r"^5.00 GiB of 1 base, /c/packed: it only saves time, and goes with rm -r /c"),
        (2, 40 * GIB, r"^40.00 GiB of 2 bases, "),
    ],
)
def test_the_packed_cache_is_told(num_bases: int, num_bytes: int, text: str) -> None:
    packed = PackedCache(path="/c/packed", num_bases=num_bases, num_bytes=num_bytes)
    (found,) = [f for f in diagnose(replace(WELL, packed=packed)) if f.name == "packed cache"]
    assert found.status == "ok" and re.search(text, found.text), found.text


def test_the_packed_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_CACHE", str(tmp_path))
    folder = tmp_path / "packed"
    assert collect([]).packed == PackedCache(path=str(folder), num_bases=0, num_bytes=0)
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(bytes(70))
    (folder / "a.json").write_bytes(bytes(20))
    (folder / ".writing-b-1").write_bytes(bytes(10))
    assert collect([]).packed == PackedCache(path=str(folder), num_bases=1, num_bytes=100)


def without(name: str) -> dict[str, str | None]:
    return {**VERSIONS, name: None}


FOLDER = WELL.folders[0]
CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"python": (3, 10, 1)}, "python", "fail", "Python 3.11"),
    ({"versions": without("torch")}, "torch", "fail", 'pip install "torch>=2.11"'),
    ({"versions": {**VERSIONS, "transformers": "5.16.9"}}, "transformers", "fail", ">=5.17"),
    ({"versions": {**VERSIONS, "torch": "2.9.1+cu128"}}, "torch", "fail", ">=2.11"),
    ({"versions": without("triton")}, "triton", "warn", "quant.kernels=eager"),
    ({"compiler": None}, "triton", "warn", "install gcc"),
    ({"bitsandbytes_builds": ("128",)}, "bitsandbytes", "warn", "upgrade bitsandbytes"),
    ({"gpus": (), "driver": None, "torch_cuda": None}, "gpu", "warn", "runs go to the CPU"),
    ({"gpus": (), "torch_cuda": None}, "gpu", "fail", "install torch's CUDA build"),
    ({"gpus": ()}, "gpu", "warn", "driver may be older"),
    (
        {"gpus": (), "environment": {"CUDA_VISIBLE_DEVICES": ""}},
        "gpu",
        "warn",
        "CUDA_VISIBLE_DEVICES='' may hide it",
    ),
    ({"bf16_slowdown": 62.1}, "processor", "warn", "train.precision=fp32"),
    ({"gpus": (replace(GPU, capability=(7, 5)),)}, "gpu 0", "warn", "train.precision=fp16"),
    ({"gpus": (replace(GPU, capability=(6, 1)),)}, "gpu 0", "fail", "place.device=cpu"),
    ({"gpus": (replace(GPU, free_bytes=40 * GIB),)}, "gpu 0", "warn", "another process"),
    ({"folders": (replace(FOLDER, is_writable=False),)}, "runs", "fail", "output_dir"),
    ({"folders": (replace(FOLDER, free_bytes=GIB),)}, "runs", "fail", "may not fit"),
    ({"folders": (replace(FOLDER, free_bytes=9 * GIB),)}, "runs", "warn", "15 GiB"),
    ({"host_free_bytes": 3 * GIB}, "memory", "warn", "nibble plan"),
    ({"shared_free_bytes": 64 * MIB}, "shared memory", "warn", "--shm-size"),
    ({"open_files": 256}, "open files", "warn", "ulimit -n"),
    ({"environment": {"HF_HUB_OFFLINE": "1"}}, "hub", "warn", "cached or local"),
    *(
        ({"versions": without(row[1][0])}, row[0], "warn", f"nibble[{extra}]")
        for extra, row in EXTRAS.items()
    ),
]


@pytest.mark.parametrize(
    ("changes", "name", "status", "advice"), CASES, ids=[f"{c[1]}-{i}" for i, c in enumerate(CASES)]
)
def test_each_trouble_is_named_with_what_to_do(
    changes: dict[str, Any], name: str, status: str, advice: str
) -> None:
    findings = bad(**changes)
    assert [(f.name, f.status) for f in findings] == [(name, status)]
    assert advice in findings[0].advice


def test_a_processor_that_computes_in_bf16_is_well() -> None:
    assert bad(bf16_slowdown=0.5) == [] == bad(bf16_slowdown=1.5)


def test_processes_are_told() -> None:
    def told(**changes: Any) -> Finding:
        found = [f for f in diagnose(replace(WELL, **changes)) if f.name == "processes"]
        assert len(found) == 1
        return found[0]

    small = replace(GPU, index=1, name="RTX 3060", total_bytes=12 * GIB, free_bytes=12 * GIB)
    pair = (GPU, replace(GPU, index=1))
    assert told().text == "nibble train runs as one"
    assert told(gpus=pair).text == "nibble train starts 2, one for each GPU"
    assert told(gpus=pair).status == "ok"
    assert told(launcher="srun: process 3 of 8, first at gpu01").text.startswith("started by srun")
    unequal = told(gpus=(GPU, small))
    assert unequal.status == "warn"
    assert unequal.advice.startswith("RTX 3060 (12.00 GiB) limits all 2 GPUs")
    assert "NCCL" in told(gpus=pair, has_nccl=False).advice


def test_no_secret_is_shown() -> None:
    findings = diagnose(replace(WELL, environment={"HF_TOKEN": "hf_abcdef"}))
    assert not any("hf_abcdef" in f.text + f.advice for f in findings)
    assert any("a token is set" in f.text for f in findings)


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    file = Path(__file__).parents[2] / "pyproject.toml"
    given = tomllib.loads(file.read_text())["project"]
    extras = given["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"test", "demo"}
    for extra, (_, distributions, _) in EXTRAS.items():
        wanted = " ".join(extras[extra])
        assert all(name in wanted for name in distributions)
    for name, least in REQUIRED.items():
        text = next(d for d in given["dependencies"] if d.startswith(name))
        assert ".".join(str(part) for part in least) in text


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    monkeypatch.chdir(tmp_path)
    findings = {f.name: f for f in examine()}
    assert findings["torch"].text == torch.__version__
    assert findings["python"].text.startswith(".".join(map(str, sys.version_info[:3])))
    assert findings["hub"].status == "warn"
    assert str(tmp_path) in findings["runs"].text
    assert not (tmp_path / "not").exists()
    facts = collect(["torch", "no-such-distribution"])
    assert facts.versions == {"torch": torch.__version__, "no-such-distribution": None}
    assert 0 < facts.host_free_bytes <= facts.host_total_bytes
    assert facts.gpus or (facts.bf16_slowdown or 0) > 0
    assert len(facts.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    from nibble.use.machine import _folder

    assert not _folder("runs", tmp_path / "x").is_writable


def test_cards_are_named_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    from nibble.spec.hardware import hardware

    for bus, model in (("0000:01:00.0", "NVIDIA H200"), ("0000:02:00.0", "NVIDIA A10G")):
        (tmp_path / bus).mkdir()
        text = f"Model: \t\t {model}\nIRQ:   \t\t 33\nVideo BIOS: \t 1.2\n"
        (tmp_path / bus / "information").write_text(text)
    assert [hardware(name).name for name in card_names(tmp_path)] == ["h200", "a10g"]
    assert card_names(tmp_path / "nothing") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [hardware(name).name for name in card_names(tmp_path)] == ["a10g"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert card_names(tmp_path) == []


def test_only_torch_is_imported() -> None:
    code = (
        "import sys; from nibble.use.doctor import examine; examine();"
        "assert not {'transformers', 'bitsandbytes', 'datasets', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_check_is_in_the_table() -> None:
    named = {getattr(doctor, name) for name in dir(doctor) if name.startswith("check_")}
    assert set(doctor.CHECKS) == named
