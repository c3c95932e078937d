"""What this machine has, and what would fail on it.

Idea. Facts are collected first (`machine.py`: versions, cards, limits, folders), then judged by
pure functions, one a row of `CHECKS`, so every judgement can be tested without the machine that
causes it. Each finding says what is there, whether it is well, and what to do; a warning names what
would not work or be slow, a failure what cannot work at all.

Nothing is downloaded, no network is touched (the hub's settings are reported, its reachability is
not probed), and of the heavy libraries only torch is imported. It costs the import of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nibble.launch.devices import Card, unequal
from nibble.spec.hardware import SLOW_BF16
from nibble.spec.units import GIB, MIB, show_bytes
from nibble.use.machine import Facts, Gpu, collect

Status = Literal["ok", "warn", "fail"]

MIN_PYTHON = (3, 11)
REQUIRED = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 6), "pydantic": (2, 10)}
EXTRAS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "data": ("datasets", ("datasets",), "hub data sets and parquet files cannot be read"),
    "gguf": ("gguf", ("gguf",), ".gguf models cannot be read, and the demo cannot run"),
    "kernels": ("bitsandbytes", ("bitsandbytes",), "4-bit weights are unpacked by slower kernels"),
    "eval": ("scores", ("scikit-learn", "rouge-score"), "GLUE and ROUGE scores are not available"),
    "tensorboard": ("tensorboard", ("tensorboard",), "report.sinks=[tensorboard] is refused"),
    "wandb": ("wandb", ("wandb",), "report.sinks=[wandb] is refused"),
    "deepspeed": ("deepspeed", ("deepspeed",), "place.kind=deepspeed is refused"),
}
"""Extra -> its name, its distributions, what does not work without it."""

MIN_DISK_BYTES, LOW_DISK_BYTES = 2 * GIB, 20 * GIB
LOW_HOST_BYTES = 8 * GIB
LOW_SHARED_BYTES = 256 * MIB
LOW_OPEN_FILES = 1024
BF16_CAPABILITY = (8, 0)
MIN_CAPABILITY = (7, 0)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; `advice` is empty when all is well."""

    name: str
    status: Status
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at this machine and judge it; imports torch, touches no network, writes nothing."""
    names = {*REQUIRED, "triton", *(d for row in EXTRAS.values() for d in row[1])}
    return diagnose(collect(names))


def diagnose(facts: Facts) -> list[Finding]:
    """The findings of all checks, in the order of the table."""
    return [finding for check in CHECKS for finding in check(facts)]


def check_python(facts: Facts) -> list[Finding]:
    """The interpreter."""
    text = ".".join(str(part) for part in facts.python) + f" on {facts.system}"
    if facts.python[:2] < MIN_PYTHON:
        return [Finding(name="python", status="fail", text=text, advice="install Python 3.11")]
    return [Finding(name="python", status="ok", text=text)]


def check_libraries(facts: Facts) -> list[Finding]:
    """The libraries without which nothing runs."""
    found = []
    for name, least in REQUIRED.items():
        version = facts.versions.get(name)
        wanted = ".".join(str(part) for part in least)
        if version is not None and _numbers(version) >= least:
            found.append(Finding(name=name, status="ok", text=version))
            continue
        text = "not installed" if version is None else f"{version}, older than {wanted}"
        advice = f'pip install "{name}>={wanted}"'
        found.append(Finding(name=name, status="fail", text=text, advice=advice))
    return found


def check_gpus(facts: Facts) -> list[Finding]:
    """Cards, driver and the CUDA that torch was built for."""
    driver = f", driver {facts.driver}" if facts.driver else ""
    if facts.torch_cuda is None:
        text = f"torch is built without CUDA{driver}"
        if facts.driver is None:
            return [Finding(name="gpu", status="warn", text=f"none; {text}", advice=_CPU_ADVICE)]
        advice = "there is a driver: install torch's CUDA build (pytorch.org/get-started)"
        return [Finding(name="gpu", status="fail", text=text, advice=advice)]
    if not facts.gpus:
        text = f"no card answers; torch is built for CUDA {facts.torch_cuda}{driver}"
        hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
        advice = _CPU_ADVICE
        if hidden is not None:
            advice = f"CUDA_VISIBLE_DEVICES={hidden!r} may hide it; {_CPU_ADVICE}"
        elif facts.driver is not None:
            advice = (
                "the driver may be older than this CUDA needs: update it, or take another torch"
            )
        return [Finding(name="gpu", status="warn", text=text, advice=advice)]
    return [_judge_gpu(gpu, f"CUDA {facts.torch_cuda}{driver}") for gpu in facts.gpus]


def _judge_gpu(gpu: Gpu, about: str) -> Finding:
    text = (
        f"{gpu.name}, {show_bytes(gpu.total_bytes)} ({show_bytes(gpu.free_bytes)} free), "
        f"compute {gpu.capability[0]}.{gpu.capability[1]}, {about}"
    )
    status: Status = "ok"
    advice = ""
    if gpu.capability < MIN_CAPABILITY:
        status = "fail"
        advice = "torch has no kernels for a card before compute 7.0: use place.device=cpu"
    elif gpu.capability < BF16_CAPABILITY:
        status = "warn"
        advice = "no bf16 in hardware: set train.precision=fp16 (the loss is scaled for you)"
    elif gpu.free_bytes < gpu.total_bytes * 0.9:
        status = "warn"
        advice = "another process holds memory there: see nvidia-smi"
    return Finding(name=f"gpu {gpu.index}", status=status, text=text, advice=advice)


def check_processor(facts: Facts) -> list[Finding]:
    """Whether a processor that has to do without a card computes in bf16."""
    if facts.bf16_slowdown is None:
        return []
    if facts.bf16_slowdown < SLOW_BF16:
        text = "products in bf16 take as long as in fp32, or less"
        return [Finding(name="processor", status="ok", text=text)]
    text = f"products in bf16 take {facts.bf16_slowdown:.0f} times as long as in fp32"
    advice = "set train.precision=fp32 for runs on this processor"
    return [Finding(name="processor", status="warn", text=text, advice=advice)]


def check_processes(facts: Facts) -> list[Finding]:
    """What `nibble train` starts here, and what would hold its processes back."""
    count = len(facts.gpus)
    text = (
        f"nibble train starts {count}, one for each GPU"
        if count > 1
        else "nibble train runs as one"
    )
    if facts.launcher is not None:
        text = f"started by {facts.launcher}"
    if count > 1 and not facts.has_nccl:
        advice = "torch lacks NCCL: GPUs exchange gradients through the host, which is slow"
        return [Finding(name="processes", status="warn", text=text, advice=advice)]
    limit = unequal(
        [
            Card(name=gpu.name, uuid=str(gpu.index), total_bytes=gpu.total_bytes)
            for gpu in facts.gpus
        ]
    )
    if limit is not None:
        return [Finding(name="processes", status="warn", text=text, advice=limit)]
    return [Finding(name="processes", status="ok", text=text)]


def check_kernels(facts: Facts) -> list[Finding]:
    """Triton and bitsandbytes, where there is a card for them."""
    if not facts.gpus:
        return []
    found = []
    triton = facts.versions.get("triton")
    if triton is None:
        advice = "pip install triton (Linux), or set quant.kernels=eager: correct, but slower"
        found.append(Finding(name="triton", status="warn", text="not installed", advice=advice))
    elif facts.compiler is None:
        advice = "Triton builds its launcher with a C compiler: install gcc"
        found.append(
            Finding(name="triton", status="warn", text=f"{triton}, no C compiler", advice=advice)
        )
    else:
        found.append(Finding(name="triton", status="ok", text=triton))
    version = facts.versions.get("bitsandbytes")
    cuda = (facts.torch_cuda or "").replace(".", "")
    if version is not None and cuda not in facts.bitsandbytes_builds:
        builds = ", ".join(facts.bitsandbytes_builds) or "none"
        found.append(
            Finding(
                name="bitsandbytes",
                status="warn",
                text=f"{version} has no library for CUDA {facts.torch_cuda} (has {builds})",
                advice="upgrade bitsandbytes, or set quant.kernels=triton or eager",
            )
        )
    return found


def check_extras(facts: Facts) -> list[Finding]:
    """Optional parts: present, or what does not work without them."""
    found = []
    for extra, (name, distributions, loss) in EXTRAS.items():
        absent = [d for d in distributions if facts.versions.get(d) is None]
        if absent:
            text = f"{', '.join(absent)} not installed: {loss}"
            advice = f'pip install "nibble[{extra}]"'
            found.append(Finding(name=name, status="warn", text=text, advice=advice))
        else:
            versions = ", ".join(f"{d} {facts.versions[d]}" for d in distributions)
            found.append(Finding(name=name, status="ok", text=versions))
    return found


def check_folders(facts: Facts) -> list[Finding]:
    """Room and permission where runs, caches and models are written."""
    found = []
    for folder in facts.folders:
        text = f"{folder.path}, {show_bytes(folder.free_bytes)} free"
        name = folder.role
        if not folder.is_writable:
            advice = f"not writable: choose another place ({_WHERE[folder.role]})"
            found.append(Finding(name=name, status="fail", text=text, advice=advice))
        elif folder.free_bytes < MIN_DISK_BYTES:
            advice = f"a checkpoint may not fit: free some, or move it ({_WHERE[folder.role]})"
            found.append(Finding(name=name, status="fail", text=text, advice=advice))
        elif folder.free_bytes < LOW_DISK_BYTES:
            advice = f"a merged 8B model takes 15 GiB ({_WHERE[folder.role]})"
            found.append(Finding(name=name, status="warn", text=text, advice=advice))
        else:
            found.append(Finding(name=name, status="ok", text=text))
    return found


def check_packed(facts: Facts) -> list[Finding]:
    """The packed bases that are kept on disk, and how to be rid of them."""
    if facts.packed is None:
        return []
    where = facts.packed.path
    if not facts.packed.num_bytes:
        text = f"empty, {where} (quant.cache; NIBBLE_CACHE moves it)"
    else:
        num = facts.packed.num_bases
        text = (
            f"{show_bytes(facts.packed.num_bytes)} of {num} base{'s' * (num != 1)}, {where}: "
            f"it only saves time, and goes with rm -r {where}"
        )
    return [Finding(name="packed cache", status="ok", text=text)]


def check_memory(facts: Facts) -> list[Finding]:
    """Host memory, shared memory and the limits that streaming and loaders run into."""
    text = (
        f"{show_bytes(facts.host_total_bytes)} ({show_bytes(facts.host_free_bytes)} free), "
        f"{facts.num_cpus} cores"
    )
    low = facts.host_free_bytes < LOW_HOST_BYTES
    advice = "models stream tensor by tensor, but torch alone takes 2 GiB: see nibble plan"
    found = [Finding(name="memory", status="warn" if low else "ok", text=text, advice=advice * low)]
    if facts.shared_free_bytes is not None:
        low = facts.shared_free_bytes < LOW_SHARED_BYTES
        text = f"{show_bytes(facts.shared_free_bytes)} free in /dev/shm"
        advice = "processes share tensors there: start the container with --shm-size=8g"
        found.append(
            Finding(
                name="shared memory", status="warn" if low else "ok", text=text, advice=advice * low
            )
        )
    if facts.gpus and facts.locked_limit_bytes is not None:
        text = f"at most {show_bytes(facts.locked_limit_bytes)} of locked memory (ulimit -l)"
        found.append(Finding(name="locked memory", status="ok", text=text))
    if facts.open_files is not None and facts.open_files < LOW_OPEN_FILES:
        text = f"at most {facts.open_files} open files"
        advice = "a model of many shards needs more: ulimit -n 4096"
        found.append(Finding(name="open files", status="warn", text=text, advice=advice))
    return found


def check_hub(facts: Facts) -> list[Finding]:
    """The hub's settings; whether it can be reached is not probed."""
    environment = facts.environment
    home = environment.get("HF_HUB_CACHE") or environment.get("HF_HOME") or "the default cache"
    offline = environment.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    token = "a token is set" if environment.get("HF_TOKEN") else "no HF_TOKEN"
    if offline:
        text = f"HF_HUB_OFFLINE is on, {home}, {token}"
        advice = "only models and data that are cached or local are found"
        return [Finding(name="hub", status="warn", text=text, advice=advice)]
    return [Finding(name="hub", status="ok", text=f"online mode (not probed), {home}, {token}")]


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    check_python,
    check_libraries,
    check_gpus,
    check_processor,
    check_processes,
    check_kernels,
    check_extras,
    check_folders,
    check_packed,
    check_memory,
    check_hub,
)
_CPU_ADVICE = "runs go to the CPU, fit for small models and for trying things out"
_WHERE = {"runs": "output_dir", "hub cache": "HF_HOME", "data cache": "data.cache_dir"}


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cu130 -> (2, 11, 0); a part that is no number ends it."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
