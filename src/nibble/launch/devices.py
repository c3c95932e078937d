"""The GPUs that a run may use, counted without torch, and how many processes they make.

The driver's own library (NVML) lists the cards; CUDA_VISIBLE_DEVICES chooses among them by CUDA's
rules: numbers, or beginnings of unique ids; the first one that names nothing ends the list. Costs
some milliseconds, where importing torch to ask costs seconds. Without NVML (another vendor, a
stripped container) torch is asked after all, if there is any sign of a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nibble.errors import PlacementError
from nibble.launch.environment import Launch
from nibble.spec.config import Place
from nibble.spec.units import show_bytes

ONE_PROCESS = ("single", "dp")
UNEQUAL = 0.9
"""Cards of one name differ by some MiB; this share of the largest is another card."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU as the driver tells it; `uuid` is GPU-... ."""

    name: str
    uuid: str
    total_bytes: int


def visible_cards(environment: Mapping[str, str]) -> list[Card]:
    """The cards that CUDA shows to a process with this environment, in CUDA's order."""
    if not torch_has_cuda():
        return []
    cards = driver_cards()
    if cards is None:
        return _ask_torch() if any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/kfd")) else []
    return choose(cards, environment.get("CUDA_VISIBLE_DEVICES"))


def choose(cards: Sequence[Card], visible: str | None) -> list[Card]:
    """What CUDA_VISIBLE_DEVICES leaves of the cards of a machine."""
    if visible is None:
        return list(cards)
    found: list[Card] = []
    for word in visible.split(","):
        word = word.strip()
        if word.startswith("MIG-"):
            # A part of a card: CUDA shows one such part to a process.
            return [Card(name="MIG", uuid=word, total_bytes=0)]
        named = [card for card in cards if word.startswith("GPU-") and card.uuid.startswith(word)]
        if word.isdecimal() and int(word) < len(cards):
            named = [cards[int(word)]]
        if len(named) != 1:
            break
        if named[0] in found:
            return []  # a card named twice: CUDA then shows none
        found += named
    return found


def num_processes(place: Place, cards: Sequence[Card]) -> int:
    """How many processes this machine runs: one for each device that the recipe may use.

    Raises PlacementError when more devices are asked for than there are.
    """
    on_cpu = place.device == "cpu" or (place.device == "auto" and not cards)
    if place.kind in ONE_PROCESS or ":" in place.device:
        return 1
    wanted = place.num_devices
    if on_cpu:
        return wanted or 1
    if wanted is not None and wanted > len(cards):
        raise PlacementError(
            f"place.num_devices={wanted}, but this machine shows {_count(len(cards))}: "
            f"set place.num_devices={len(cards)} or look at CUDA_VISIBLE_DEVICES"
            if cards
            else f"place.num_devices={wanted} with place.device={place.device}, but no GPU is "
            "there: use place.device=cpu"
        )
    return wanted or max(1, len(cards))


def check_launched(place: Place, launch: Launch) -> None:
    """Raise PlacementError when a launcher started another number of processes than asked for."""
    if launch.starts == "machines":
        return
    if place.kind in ONE_PROCESS and launch.world > 1:
        raise PlacementError(
            f"place.kind={place.kind} is one process, but {launch.launcher} started "
            f"{launch.world}: use place.kind=ddp, fsdp or stream, or start one"
        )
    if place.num_devices is not None and place.num_devices != launch.local_world:
        raise PlacementError(
            f"place.num_devices={place.num_devices}, but {launch.launcher} started "
            f"{launch.local_world} on this machine: leave place.num_devices out, or start as many"
        )


def unequal(cards: Sequence[Card]) -> str | None:
    """A line about cards of different sizes: every one gets the same work; None when equal."""
    known = [card for card in cards if card.total_bytes]
    if len(known) < 2:
        return None
    small, large = (pick(known, key=lambda card: card.total_bytes) for pick in (min, max))
    if small.total_bytes >= UNEQUAL * large.total_bytes:
        return None
    return (
        f"{small.name} ({show_bytes(small.total_bytes)}) limits all {len(known)} GPUs, of which "
        f"the largest is {large.name} ({show_bytes(large.total_bytes)}): each does the same work; "
        "choose equal ones by CUDA_VISIBLE_DEVICES"
    )


def torch_has_cuda() -> bool:
    """Whether the installed torch is built for GPUs; read from its file, without importing it."""
    spec = importlib.util.find_spec("torch")
    file = (
        None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    )
    if file is None or not file.is_file():
        return True  # not laid out as we know it: let the driver say
    built = re.findall(r"^(?:cuda|hip)\b[^=\n]*= *(.+)$", file.read_text(), re.M)
    return not built or any(value.strip() != "None" for value in built)


class _NvmlMemory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def driver_cards() -> list[Card] | None:
    """The cards that NVIDIA's driver lists, in the order of their bus; None without its library."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return [card for i in range(count.value) if (card := _card(nvml, i)) is not None]
    finally:
        nvml.nvmlShutdown()


def _card(nvml: ctypes.CDLL, index: int) -> Card | None:
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None  # not ours to use, as in a container that was given others
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
    nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(96))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return Card(name=name.value.decode(), uuid=uuid.value.decode(), total_bytes=memory.total)


def _ask_torch() -> list[Card]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        Card(
            name=torch.cuda.get_device_name(index),
            uuid=f"GPU-{index}",
            total_bytes=torch.cuda.get_device_properties(index).total_memory,
        )
        for index in range(count)
    ]


def _count(number: int) -> str:
    return f"{number} GPU{'s' * (number != 1)}"
