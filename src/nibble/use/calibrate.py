"""What this machine really does: the rates that a plan divides by, measured in a few seconds.

    matmul       16-bit products of a Llama's shapes (4096 tokens; 4096 x 4096, 4096 x 14336, back)
                 on random values, FLOPs of the second half of `seconds` over its time: cards lower
                 their clocks when they are warm, and a step is warm
    fp32         one such product in fp32, without tensor cores
    memory       a copy within device memory, bytes read and written over its time
    bus          pinned copies to and from the device, the slower of the two
    link         a copy from one card to the next, where there are two
    launch       host time of a step of a small model over its planned launches (cli/host_rate.py)

On a CPU the bus is memory itself, and a launch is the time of one small operation.

Nothing else may use the card meanwhile. It costs some twenty seconds, 2 GiB of device memory and
half a GiB of pinned memory, and says nothing of a particular model.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nibble.errors import ConfigError, PlacementError
from nibble.spec.hardware import CPU, Hardware, hardware, known, user_file
from nibble.spec.hardware_rows import Value, changed
from nibble.spec.units import GIB
from nibble.use.machine import host_memory
from nibble.weights.files import atomic

SOURCE = "measured by nibble"


class StepTimer(Protocol):
    """Measures the host's seconds for a bare launch of a plan."""

    def __call__(self, device: str, *, precision: str, steps: int) -> float:
        """By `steps` steps of a small model on `device` (cuda, cuda:1), in bf16 or fp16."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured: tokens and widths of the products, bytes of the copies, seconds."""

    tokens: int = 4096
    hidden: int = 4096
    ffn: int = 14336
    copy_bytes: int = 1 << 30
    pinned_bytes: int = 1 << 28
    num_steps: int = 40
    num_operations: int = 5000
    seconds: float = 2.5
    """Of the 16-bit products; all else takes a fifth of it."""


ON_CPU = Sizes(tokens=512, hidden=1024, ffn=2816, copy_bytes=1 << 27, seconds=1.0)
"""A processor is a hundred times as slow."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured. `link_gbs` is None with one card; `bus_gbs` the slower direction."""

    device: str
    memory_gib: float
    matmul_tflops: float
    fp32_tflops: float
    bandwidth_gbs: float
    to_device_gbs: float
    from_device_gbs: float
    link_gbs: float | None
    launch_us: float

    @property
    def bus_gbs(self) -> float:
        """Of the two directions the slower one: a plan streams both ways."""
        return min(self.to_device_gbs, self.from_device_gbs)

    def row(self) -> dict[str, Value]:
        """As keys of hardware.toml, rounded to what a second measurement would repeat."""
        rates = {
            "sustained_tflops": self.matmul_tflops,
            "sustained_fp32_tflops": self.fp32_tflops,
            "bandwidth_gbs": self.bandwidth_gbs,
            "bus_gbs": self.bus_gbs,
            "link_gbs": self.link_gbs,
            "launch_us": self.launch_us,
        }
        return {key: _rounded(rate) for key, rate in rates.items() if rate is not None}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A row as it was (None: there was none) and as it is now, and the file that has it."""

    key: str
    before: Hardware | None
    after: Hardware
    rates: Rates
    file: Path


def calibrate(
    device: torch.device | str | None = None, *, step: StepTimer, sizes: Sizes | None = None
) -> Calibration:
    """Measure a device (default: the first card, or the processor) and write the user's row of it.

    `step` times a card's launches by steps of a model, which are of a higher floor than this.
    Raises PlacementError when the device's memory is taken, ConfigError for a user's file that
    cannot be read, changed or written.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    known()  # a wrong file is said before anything is measured
    before = _row_of(_name(place), on_cpu=place.type == "cpu")
    try:
        found = measure(place, step=step, sizes=sizes)
    except torch.OutOfMemoryError:
        raise PlacementError(
            f"{place} has too little free memory to be measured: end what else runs on it"
        ) from None
    key = before.name if before is not None else _key(found.device, on_cpu=place.type == "cpu")
    file = write(key, found, is_new=before is None)
    return Calibration(key=key, before=before, after=hardware(key), rates=found, file=file)


def measure(device: torch.device, *, step: StepTimer, sizes: Sizes | None = None) -> Rates:
    """The rates of one device; `sizes`: how much to measure, by default what takes seconds."""
    on_cpu = device.type == "cpu"
    if sizes is None:
        sizes = ON_CPU if on_cpu else Sizes()
    short = replace(sizes, seconds=sizes.seconds / 5)
    bandwidth = _copy_rate(device, device, num_bytes=sizes.copy_bytes, sizes=short)
    to_device = from_device = bandwidth
    host = torch.device("cpu")
    if not on_cpu:
        to_device = _copy_rate(host, device, num_bytes=sizes.pinned_bytes, sizes=short)
        from_device = _copy_rate(device, host, num_bytes=sizes.pinned_bytes, sizes=short)
    return Rates(
        device=_name(device),
        memory_gib=_memory_bytes(device) / GIB,
        matmul_tflops=_matmul_rate(device, _narrow(device), sizes) / 1e12,
        fp32_tflops=_matmul_rate(device, torch.float32, short) / 1e12,
        bandwidth_gbs=2 * bandwidth / 1e9,
        to_device_gbs=(2 if on_cpu else 1) * to_device / 1e9,
        from_device_gbs=(2 if on_cpu else 1) * from_device / 1e9,
        link_gbs=_link_rate(device, short),
        launch_us=_launch_s(device, step, sizes) * 1e6,
    )


def write(key: str, rates: Rates, *, is_new: bool) -> Path:
    """Put the rates into the user's file, atomically; a new row also gets its memory and names."""
    values = rates.row()
    if is_new:
        values = {
            "names": [rates.device],
            "memory_gib": round(rates.memory_gib, 2),
            "matmul_tflops": values["sustained_tflops"],
            **values,
        }
    values |= {"source": SOURCE, "date": datetime.date.today()}
    file = user_file()
    target = file.resolve()  # a link stays a link
    try:
        text = target.read_text(encoding="utf-8") if target.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    made = changed(text, key, values)
    with atomic(target, error=ConfigError) as stream:
        stream.write(made.encode())
    return file


def _matmul_rate(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> float:
    """Sustained FLOP/s of a block's three shapes; fp32 takes the smallest alone."""
    tokens, hidden, ffn = sizes.tokens, sizes.hidden, sizes.ffn
    shapes = [(hidden, hidden), (hidden, ffn), (ffn, hidden)]
    if dtype == torch.float32:
        shapes = shapes[:1]
    pairs = [
        (_random(tokens, inside, dtype, device), _random(inside, out, dtype, device))
        for inside, out in shapes
    ]
    flops = sum(2.0 * tokens * inside * out for inside, out in shapes)

    def products() -> None:
        for x, weight in pairs:
            torch.mm(x, weight)

    return flops / _seconds(products, device, sizes)


def _narrow(device: torch.device) -> torch.dtype:
    """bf16, or fp16 where a card has no products of it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16


def _random(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values: cards compute zeros faster."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, dtype=dtype, device=device, generator=generator)


def _copy_rate(
    source: torch.device, target: torch.device, *, num_bytes: int, sizes: Sizes
) -> float:
    """Bytes a second of a copy, pinned where one end is the host and the other is not."""
    pinned = source.type != target.type
    start = torch.ones(
        num_bytes, dtype=torch.uint8, device=source, pin_memory=pinned and source.type == "cpu"
    )
    end = torch.zeros(
        num_bytes, dtype=torch.uint8, device=target, pin_memory=pinned and target.type == "cpu"
    )
    device = target if source.type == "cpu" else source
    return num_bytes / _seconds(lambda: end.copy_(start, non_blocking=True), device, sizes)


def _link_rate(device: torch.device, sizes: Sizes) -> float | None:
    """GB/s from this card to the next; None with one card."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return None
    index = device.index or 0
    other = torch.device("cuda", (index + 1) % torch.cuda.device_count())
    here = torch.device("cuda", index)
    return _copy_rate(here, other, num_bytes=sizes.pinned_bytes, sizes=sizes) / 1e9


def _launch_s(device: torch.device, step: StepTimer, sizes: Sizes) -> float:
    """Host seconds of a step's kernel, of a processor's operation."""
    if device.type == "cpu":
        return operation_s(device, num_operations=sizes.num_operations)
    precision = "bf16" if _narrow(device) == torch.bfloat16 else "fp16"
    return step(str(device), precision=precision, steps=sizes.num_steps)


def operation_s(device: torch.device, *, num_operations: int) -> float:
    """Host seconds of one small operation; the least of some series, the others were disturbed."""
    small = torch.zeros(64, device=device)
    each = max(1, num_operations // 5)
    times = []
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        for _ in range(each):
            small.add_(1.0)
        times.append(time.perf_counter() - start)
    _wait(device)
    return min(times) / each


def _seconds(action: Callable[[], object], device: torch.device, sizes: Sizes) -> float:
    """Seconds of one action: the median of the second half of `sizes.seconds`, in small series."""
    action()
    _wait(device)
    start = time.perf_counter()
    action()
    _wait(device)
    once = max(time.perf_counter() - start, 1e-6)
    series = max(1, min(100, int(sizes.seconds / 20 / once)))
    times: list[float] = []
    spent = 0.0
    while spent < sizes.seconds or len(times) < 4:
        start = time.perf_counter()
        for _ in range(series):
            action()
        _wait(device)
        taken = time.perf_counter() - start
        times.append(taken / series)
        spent += taken
    return statistics.median(times[len(times) // 2 :])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    """As the driver calls the card, or the system the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()[0]


def _row_of(name: str, *, on_cpu: bool) -> Hardware | None:
    """The row that a plan would take; None for a card without one."""
    with suppress(ConfigError):
        return hardware(CPU if on_cpu else name)
    return None


def _key(name: str, *, on_cpu: bool) -> str:
    """Key of a new row: letters and digits of the card's name."""
    if on_cpu:
        return CPU
    words = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    return "-".join(part for part in words.split("-") if part and part != "nvidia")


def _rounded(rate: float) -> float:
    """Three significant digits."""
    return float(f"{rate:.3g}")
