"""The facts of this machine: versions, cards, folders, limits.

Idea. Everything that `doctor.py` judges is read here into one value, so that judging stays pure.
Versions come from the distributions' metadata, the driver's from the kernel, memory within the
container's limit; of the heavy libraries only torch is imported, to ask for the cards. Nothing is
written and no network is touched. Linux tells most; elsewhere some facts are None.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nibble.errors import ConfigError
from nibble.launch.devices import Card, choose
from nibble.launch.environment import detect
from nibble.spec.arch import hub_cache


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card as the driver reports it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that nibble writes to."""

    role: str
    path: str
    free_bytes: int
    is_writable: bool


@dataclass(frozen=True, kw_only=True)
class PackedCache:
    """Where packed bases are kept (weights/packed_cache.py), and how much that is."""

    path: str
    num_bases: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is judged. `versions` has None for what is not installed."""

    python: tuple[int, int, int]
    system: str
    versions: Mapping[str, str | None]
    torch_cuda: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    compiler: str | None
    bitsandbytes_builds: tuple[str, ...]
    folders: tuple[Folder, ...]
    num_cpus: int
    host_total_bytes: int
    host_free_bytes: int
    shared_free_bytes: int | None
    locked_limit_bytes: int | None
    """None: no limit."""
    open_files: int | None
    environment: Mapping[str, str]
    bf16_slowdown: float | None = None
    """Of the processor's products in bf16 against fp32; None where a card computes."""
    has_nccl: bool = True
    launcher: str | None = None
    """Who started this process as one of several, and as which."""
    packed: PackedCache | None = None


def collect(distributions: Iterable[str]) -> Facts:
    """The facts of this machine, with the versions of these distributions."""
    torch_cuda, gpus = _torch_facts()
    total, free = host_memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nibble"
    return Facts(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in sorted(distributions)},
        torch_cuda=torch_cuda,
        driver=_driver(),
        gpus=gpus,
        compiler=shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"),
        bitsandbytes_builds=_bitsandbytes_builds(),
        folders=(
            _folder("runs", Path.cwd()),
            _folder("hub cache", hub_cache()),
            _folder("data cache", cache),
        ),
        num_cpus=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        host_total_bytes=total,
        host_free_bytes=free,
        shared_free_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        locked_limit_bytes=_limit("RLIMIT_MEMLOCK"),
        open_files=_limit("RLIMIT_NOFILE"),
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        bf16_slowdown=None if gpus else _bf16_slowdown(),
        has_nccl=_has_nccl(),
        launcher=_launcher(),
        packed=_packed_cache(),
    )


_ENVIRONMENT = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "CUDA_VISIBLE_DEVICES")


def _packed_cache() -> PackedCache | None:
    if importlib.util.find_spec("torch") is None:
        return None
    from nibble.weights.packed_cache import cache_contents, cache_folder

    folder = cache_folder()
    num_bases, num_bytes = cache_contents(folder)
    return PackedCache(path=str(folder), num_bases=num_bases, num_bytes=num_bytes)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_facts() -> tuple[str | None, tuple[Gpu, ...]]:
    if importlib.util.find_spec("torch") is None:
        return None, ()
    import torch

    if not torch.cuda.is_available():
        return torch.version.cuda, ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            Gpu(
                index=index,
                name=properties.name,
                total_bytes=total,
                free_bytes=free,
                capability=capability,
            )
        )
    return torch.version.cuda, tuple(gpus)


def _bf16_slowdown() -> float | None:
    if importlib.util.find_spec("torch") is None:
        return None
    from nibble.place.devices import bf16_slowdown

    return bf16_slowdown()


def _has_nccl() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_nccl_available()


def _launcher() -> str | None:
    try:
        launch = detect(os.environ)
    except ConfigError as error:
        return str(error)
    if launch is None:
        return None
    what = "process" if launch.starts == "processes" else "machine"
    return f"{launch.launcher}: {what} {launch.rank} of {launch.world}, first at {launch.master}"


def card_names(gpus: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Names of the NVIDIA cards that CUDA shows to this process, without torch; Linux only.

    `nibble plan` takes the cards from here when none is named. An empty list means that no driver
    told, or that CUDA_VISIBLE_DEVICES hides them all.
    """
    cards = []
    for file in sorted(gpus.glob("*/information")):
        lines = file.read_text(errors="replace").splitlines()
        told = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        if "Model" in told:
            uuid = told.get("GPU UUID", "")
            cards.append(Card(name=told["Model"], uuid=uuid, total_bytes=0))
    return [card.name for card in choose(cards, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def _driver() -> str | None:
    """Version of the kernel's NVIDIA driver, where Linux tells."""
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return None
    words = file.read_text(errors="replace").split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def _bitsandbytes_builds() -> tuple[str, ...]:
    """CUDA versions that the installed bitsandbytes brings a library for, such as 130."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        return ()
    files = Path(spec.origin).parent.glob("libbitsandbytes_cuda*")
    return tuple(sorted({file.stem.removeprefix("libbitsandbytes_cuda") for file in files}))


def _folder(role: str, path: Path) -> Folder:
    """Room and permission of a folder, or of the nearest one above it that exists."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    free = shutil.disk_usage(existing).free
    return Folder(role=role, path=str(path), free_bytes=free, is_writable=writable)


def host_memory() -> tuple[int, int]:
    """Total and available bytes, within the container's limit where Linux has one."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages, pages
    rows = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    total = int(rows["MemTotal"].split()[0]) * 1024
    free = int(rows.get("MemAvailable", rows["MemFree"]).split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        most = int(limit.read_text())
        total, free = min(total, most), min(free, max(0, most - int(used.read_text())))
    return total, free


def _limit(name: str) -> int | None:
    """A soft limit of this process; None when there is none."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft
