"""Low-rank training of a 7B Llama beside galore_torch and bitsandbytes: refresh, update, step.

    python bench/galore.py [refresh] [update] [step] [small] [--tiny] [--rows WORD,...] [--profile]

refresh   seconds to make all 224 bases anew at once, and the longest step when they are staggered;
          with --rows factors also of the factors alone
update    milliseconds of one optimiser step over all 6.7 G parameters, steady, no refresh in it
step      tokens/s of nibble's own training step of LLaMA-7B, 16x256 under caps of 23.5 and 19 GiB,
          refreshes counted, and galore_torch's layer-wise training without its refreshes
small     the same at 8x256 under 15.5 GiB (bf16 weights) and 11.5 GiB (INT8 weights)

Random weights and gradients; what counts is shapes. `--rows` runs the rows whose name contains a
WORD. `--tiny` takes a small model and runs on a CPU. `key=value` changes the recipes of step and
small. Every part, and every row of step and small, has a process of its own, so that one that does
not fit spoils nothing; the allocator's segments grow unless PYTORCH_CUDA_ALLOC_CONF says otherwise.
One JSON line a row, with GiB by phase (the peak within it, allocated and reserved after it), and a
table at the end; a row that does not fit says in which phase.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from galore_peers import Make, Named, peer_rows, svd_refresh_s
from galore_steps import ROWS, step_row
from kernel_times import kernel_times
from torch import Tensor, nn

from nibble.numerics import cholesky, lowrank
from nibble.optim import Optimizer, layerwise_
from nibble.optim.refresh import Due, refresh_
from nibble.spec.lowrank import METHODS
from nibble.spec.units import GIB

PARTS = ("refresh", "update", "step", "small")
OURS = (("fp32", False), ("bf16", False), ("8bit", False), ("8bit", True), ("bf16", True))
WITH_RESIDUAL = ("fira", "balanced", "apollo", "apollo-mini")
"""Methods that add something of the gradient outside of the basis, with 8-bit states."""
TABLE = (
    *("row", "ms", "host_ms", "ratio", "seconds", "tokens_per_s"),
    *("state_gib", "peak_gib", "reserved_gib", "out_of_memory"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's sizes and how its matrices are projected."""

    hidden: int
    inner: int
    num_layers: int
    vocabulary: int
    rank: int
    gap: int = 200

    def named(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all parameters; those of two dims in layers are projected."""
        hidden, inner = self.hidden, self.inner
        layer = {
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found: list[tuple[str, tuple[int, ...]]] = [("embed_tokens", (self.vocabulary, hidden))]
        for number in range(self.num_layers):
            found += [(f"layers.{number}.{name}", shape) for name, shape in layer.items()]
        return [*found, ("norm", (hidden,)), ("lm_head", (self.vocabulary, hidden))]


LLAMA_7B = Shape(hidden=4096, inner=11008, num_layers=32, vocabulary=32000, rank=1024)
TINY = Shape(hidden=64, inner=176, num_layers=2, vocabulary=512, rank=16, gap=10)


@dataclass(frozen=True, kw_only=True)
class Set:
    """Parameters and the gradients that they are given in every step."""

    shape: Shape
    named: Named
    grads: list[Tensor]

    @property
    def params(self) -> list[nn.Parameter]:
        return [param for _, param in self.named]

    @property
    def projected(self) -> list[nn.Parameter]:
        return [param for name, param in self.named if "layers." in name and param.dim() == 2]


def main() -> None:
    options = _options()
    if options.one is None:
        _table([row for job in _jobs(options) for row in _in_own_process(job)])
        return
    # No process but this one may touch the device: the parent never asks for it.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    part, _, name = options.one.partition(": ")
    if part in ROWS:
        row = next(row for row in ROWS[part] if row.name == name)
        if (found := step_row(part, row, options, device=device)) is not None:
            _say(**found)
        return
    shape = TINY if options.tiny else LLAMA_7B
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    _say(bench="galore", device=card, torch=torch.__version__, rank=shape.rank, gap=shape.gap)
    make = _refreshes if part == "refresh" else _updates
    for found in make(_set(shape, device=device), device, options):
        _say(**found)


def _jobs(options: argparse.Namespace) -> Iterator[str]:
    """What gets a process: parts, and rows of step and small."""
    for part in options.parts:
        if part not in ROWS:
            yield part
            continue
        yield from (f"{part}: {row.name}" for row in ROWS[part] if wanted(options, row.name))


def _in_own_process(job: str) -> Iterator[dict[str, Any]]:
    """The rows that another process with the same options prints, as they come."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{") and "row" in (found := json.loads(line)):
                yield found
    if process.returncode != 0:
        failed = {"row": job, "failed": process.returncode}
        _say(**failed)
        yield failed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="PART or key=value")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="device time by kernel, our rows")
    options = parser.parse_intermixed_args()
    options.parts = [word for word in options.words if "=" not in word] or list(PARTS)
    options.overrides = [word for word in options.words if "=" in word]
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {min(unknown)}: use {', '.join(PARTS)}")
    options.chosen = [word.strip() for word in options.rows.split(",") if word.strip()]
    return options


def wanted(options: argparse.Namespace, row: str) -> bool:
    """Whether --rows lets this row run."""
    return not options.chosen or any(word in row for word in options.chosen)


def _set(shape: Shape, *, device: torch.device) -> Set:
    """bf16 parameters of the model with gradients as flat in their spectrum as can be."""
    named = [
        (
            name,
            nn.Parameter(torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(0, 0.02)),
        )
        for name, sizes in shape.named()
    ]
    grads = [torch.empty_like(param).normal_(0, 1e-4).detach() for _, param in named]
    return Set(shape=shape, named=named, grads=grads)


def _ours(tensors: Set, *, codec: str, layerwise: bool = False, **options: Any) -> Optimizer:
    """nibble's optimiser over the set, as recipes build it."""
    matrices = tensors.projected
    chosen = set(matrices)
    low_rank = {
        "rank": tensors.shape.rank,
        "update_proj_gap": tensors.shape.gap,
        "scale": 0.25,
        "basis": "randomised",
        "basis_storage": "bf16",
        **options,
    }
    rest = [param for param in tensors.params if param not in chosen]
    if low_rank["basis"] == "seeded":  # made again when it is needed
        del low_rank["basis_storage"]
    groups = [{"params": rest}, {"params": matrices, **low_rank}]
    optimizer = Optimizer(groups, lr=1e-4, codec=codec, stochastic_rounding=True)
    if layerwise:
        layerwise_(optimizer)
    return optimizer


class _Give(torch.autograd.Function):
    """A loss whose gradient is a tensor that is there already, so that backward costs nothing."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, unused: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


def _give(tensors: Set) -> None:
    """Let every gradient arrive as backward brings them: one by one, last parameter first."""
    pairs = zip(tensors.params, tensors.grads, strict=True)
    sum(_Give.apply(param, grad) for param, grad in pairs).backward()


def _refreshes(
    tensors: Set, device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """All bases at once, then the steps of one gap with staggered refreshes, then the SVDs.

    Factors alone only where `--rows` asks for them.
    """
    if options.chosen and wanted(options, "factors"):
        yield from _factors(tensors.shape.rank, device)
    ours = _refresh(tensors, device, options)
    yield ours
    _reset(device)
    if wanted(options, "staggered"):
        yield _staggered(tensors, device)
    if not wanted(options, "SVD"):
        return
    shapes = [(param.shape[0], param.shape[1]) for param in tensors.projected]
    found = svd_refresh_s(shapes, device=device)
    all_s = found.pop("all")
    yield {
        "row": "refresh: fp32 SVDs as galore_torch's (one of each shape, times its count)",
        "seconds": round(all_s, 2),
        "each_s": {key: round(value, 3) for key, value in found.items()},
        "ratio": round(all_s / ours["seconds"], 1),
    }


def _refresh(tensors: Set, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """All bases from whole gradients, as the ordinary mode makes them."""
    fallbacks = [0]
    whole = lowrank.householder

    def counted(columns: Tensor) -> Tensor:
        fallbacks[0] += 1
        return whole(columns)

    optimizer = _ours(tensors, codec="8bit", stagger=False)
    _assign(tensors)
    optimizer.step()  # makes the state, and the first bases: a warm-up
    projections = optimizer.projections(1)

    def refresh() -> None:
        due = []
        for weight, projection in projections.items():
            state, grad = optimizer.state[weight], weight.grad
            assert grad is not None
            due.append(Due(projection, state, grad, state["step"]))
        refresh_(due)

    _reset_peak(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    lowrank.householder = counted
    spent_s = [_timed(refresh, device) for _ in range(3)]
    lowrank.householder = whole
    row = {
        "row": "refresh: nibble randomised, all at once",
        "seconds": round(statistics.median(spent_s), 4),
        "host_s": round(_host_s(refresh, device), 4),
        "num_matrices": len(projections),
        "householder": fallbacks[0],
        "orthogonality": _orthogonality(optimizer),
        "temporaries_gib": round(max(0.0, _peak(device) - before / GIB), 3),
        "peak_gib": _peak(device),
    }
    if options.profile:
        row["profile"] = kernel_times(refresh, device=device)
    return row


def _factors(rank: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Milliseconds of inverse factors by size of leaves and number of matrices, and of what they
    stand for: a library's factor and solve, one matrix after another.
    """
    columns = torch.randn(4 * rank, rank, device=device).div_(2 * rank**0.5)
    for number in (1, 13):
        grams = (columns.mT @ columns).expand(number, rank, rank)
        found: dict[str, float] = {}
        for leaf in (rank // 16, rank // 8, rank // 4):
            own, cholesky.LEAF = cholesky.LEAF, leaf
            made = lambda: cholesky.inverse_factors_(grams.clone(), shift=1e-6)  # noqa: B023, E731
            found[f"leaf {leaf}"] = _least_ms(made, device)
            cholesky.LEAF = own

        def solved() -> None:
            for gram in grams:  # noqa: B023
                upper, _ = torch.linalg.cholesky_ex(gram, upper=True)
                torch.linalg.solve_triangular(upper, columns, upper=True, left=False)

        found["solve"] = _least_ms(solved, device)
        yield {"row": f"refresh: factors of {number}", **found}


def _least_ms(call: Callable[[], object], device: torch.device) -> float:
    return round(min(_timed(call, device) for _ in range(5)) * 1e3, 3)


def _host_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until all is launched."""
    _wait(device)
    start = time.perf_counter()
    call()
    spent_s = time.perf_counter() - start
    _wait(device)
    return spent_s


def _orthogonality(optimizer: Optimizer) -> float:
    """The largest element of B^T B - 1 over stored bases B; 2e-3 is what bfloat16 allows."""
    worst = 0.0
    for state in optimizer.state.values():
        for name in ("basis_left", "basis_right"):
            if (basis := state.get(name)) is not None:
                gram = basis.float().mT @ basis.float()
                gram.diagonal().sub_(1)
                worst = max(worst, gram.abs().amax().item())
    return round(worst, 7)


def _staggered(tensors: Set, device: torch.device) -> dict[str, Any]:
    """Layer-wise steps with refreshes one by one: the longest against the median."""
    optimizer = _ours(tensors, codec="8bit", layerwise=True)
    times_s = []
    first = 18  # matrices leave their random bases in the first 16 steps
    for number in range(first + min(80, tensors.shape.gap)):

        def step() -> None:
            _give(tensors)
            optimizer.step()
            optimizer.zero_grad()

        spent_s = _timed(step, device)
        if number >= first:
            times_s.append(spent_s)
    median_s = statistics.median(times_s)
    _drop(tensors)
    return {
        "row": "refresh: nibble staggered, layer-wise, longest step",
        "ms": round(max(times_s) * 1e3, 1),
        "median_ms": round(median_s * 1e3, 1),
        "ratio": round(max(times_s) / median_s, 3),
        "num_steps": len(times_s),
    }


def _updates(
    tensors: Set, device: torch.device, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Steady steps of every contender; the ratio is to galore_torch's 8-bit AdamW."""
    shape = tensors.shape
    rows: dict[str, tuple[Make, bool]] = {}
    for codec, layerwise in OURS:
        name = f"update: nibble adamw {codec}" + (", layer-wise" if layerwise else "")
        # A gap that no timed step meets.
        rows[name] = (
            lambda codec=codec, layerwise=layerwise: _ours(
                tensors, codec=codec, layerwise=layerwise, update_proj_gap=100_000
            ),
            layerwise,
        )
    for method in WITH_RESIDUAL:
        words = {**METHODS[method], "update_proj_gap": 100_000, "codec": "8bit"}
        if words.get("basis") == "svd":  # which is the same in a steady step, and minutes to make
            words["basis"] = "randomised"
        rows[f"update: nibble {method} 8bit"] = (lambda words=words: _ours(tensors, **words), False)
    full = lambda: Optimizer(  # noqa: E731
        tensors.params, lr=1e-4, codec="8bit", stochastic_rounding=True
    )
    rows["update: nibble adamw 8bit, full rank"] = (full, False)
    peers = peer_rows(tensors.named, projected=set(tensors.projected), rank=shape.rank, gap=100_000)
    rows |= {f"update: {name}": (make, False) for name, make in peers.items()}
    found = []
    _assign(tensors)
    given_ms = _given_ms(tensors, device)
    for name, (make, layerwise) in rows.items():
        if not wanted(options, name):
            continue
        try:
            row = _update(name, make, tensors, device, options, layerwise=layerwise)
        except torch.OutOfMemoryError:
            row = {"row": name, "out_of_memory": True}
        if layerwise and "ms" in row:
            row["ms"] = round(row["ms"] - given_ms, 2)
            row["less_given_ms"] = round(given_ms, 2)
        found.append(row)
        _drop(tensors)
        _reset(device)
    base = next(
        (r["ms"] for r in found if "galore_torch AdamW8bit" in r["row"] and "ms" in r), None
    )
    for row in found:
        if base is not None and "ms" in row:
            row["ratio"] = round(base / row["ms"], 2)
        yield row


def _given_ms(tensors: Set, device: torch.device) -> float:
    """What handing over the gradients costs by itself (torch copies each), to be taken off."""
    times_s = []
    for _ in range(4):
        _drop(tensors)
        times_s.append(_timed(lambda: _give(tensors), device))
    _drop(tensors)
    return min(times_s[1:]) * 1e3


def _update(
    name: str,
    make: Make,
    tensors: Set,
    device: torch.device,
    options: argparse.Namespace,
    *,
    layerwise: bool,
) -> dict[str, Any]:
    optimizer = make()

    def step() -> None:
        if layerwise:
            _give(tensors)
        optimizer.step()
        if layerwise:
            optimizer.zero_grad()

    warmup = 19 if layerwise else 2  # layer-wise: the first bases come within 16 steps
    times_s, hosts_s = [], []
    for number in range(warmup + options.steps):
        if not layerwise:
            _assign(tensors)
        if number == warmup:
            _reset_peak(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        start = time.perf_counter()
        step()
        launched = time.perf_counter()
        _wait(device)
        if number >= warmup:
            times_s.append(time.perf_counter() - start)
            hosts_s.append(launched - start)
    state = [v for own in optimizer.state.values() for v in own.values()]
    row = {
        "row": name,
        "ms": round(statistics.median(times_s) * 1e3, 2),
        "host_ms": round(statistics.median(hosts_s) * 1e3, 2),
        "state_gib": round(sum(v.nbytes for v in state if isinstance(v, Tensor)) / GIB, 3),
        "temporaries_gib": round(max(0.0, _peak(device) - before / GIB), 3),
    }
    if options.profile and "nibble" in name:
        row["profile"] = kernel_times(step, device=device)
    return row


def _assign(tensors: Set) -> None:
    """Give every parameter its gradient again: some optimisers replace it."""
    for param, grad in zip(tensors.params, tensors.grads, strict=True):
        param.grad = grad


def _drop(tensors: Set) -> None:
    """Take gradients and hooks off."""
    for param in tensors.params:
        param.grad = None
        param._post_accumulate_grad_hooks = None
        param._backward_hooks = None


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if device.type == "cuda" else 0.0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _table(rows: list[dict[str, Any]]) -> None:
    columns = [key for key in TABLE if any(key in row for row in rows)]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in columns) + " |")


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
