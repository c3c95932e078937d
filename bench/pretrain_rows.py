"""One pretraining run of one row of the table: a method, a learning rate, a seed, some tokens.

Weights are float32 (the optimiser's) with a bfloat16 copy that the model computes with, for every
row alike: of each step's bfloat16 gradients a float32 copy is clipped and stepped with. Only the
layer-wise row trains bfloat16 weights with stochastic rounding, as it is used, since its hooks sit
on the weights of the model. Batches are rows of a table of tokens that lies on the device; loss and
gradients of one batch are one CUDA graph (eager in the layer-wise row, and wherever capturing
fails), so the host only launches the optimiser. Nothing waits for the device within a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nibble.nn.adapters import adapt_
from nibble.nn.factorised import factorise_, factorised
from nibble.nn.fused import fuse_
from nibble.nn.loss import IGNORE, causal_lm_loss
from nibble.nn.merging import merge_and_restart_
from nibble.optim import Schedule, build, clip_grad_norm_
from nibble.spec.builtin_models import Shape, config_of
from nibble.spec.config import Adapter, Optim

GAP = 200
TINY = Shape(32, 64, 2, 2)
NUM_WARMUP, NUM_RESTARTS = 5, 3
BESIDE = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
LORA = {"kind": "lora", "targets": ["all-linear"], "modules_to_save": list(BESIDE)}
# name -> (first guess of the rate, optim, adapter); ranks are added where a row has one
ROWS: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "adamw": (2e-3, {}, {}),
    "galore-randomised": (1e-2, {"method": "galore", "basis": "randomised"}, {}),
    "galore_torch": (1e-2, {}, {}),
    "fira": (1e-2, {"method": "fira"}, {}),
    "balanced": (1e-2, {"method": "balanced"}, {}),
    "apollo": (1e-2, {"method": "apollo"}, {}),
    "galore-svd": (1e-2, {"method": "galore"}, {}),
    "adamw8bit": (2e-3, {"name": "adamw8bit"}, {}),
    "apollo-mini": (1e-2, {"method": "apollo-mini", "rank": 1}, {}),
    "galore8bit-layerwise": (1e-2, {"method": "galore8bit", "layerwise": True}, {}),
    "lora": (3e-3, {}, LORA),
    "relora": (3e-3, {"restart_every": 1}, LORA),
    "q-galore": (1e-2, {"method": "q-galore"}, {}),
    "adafactor": (1e-3, {"name": "adafactor-momentum"}, {}),
    "low-rank": (3e-3, {}, {"kind": "factorised"}),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of one table share: the model's shape, a batch, and the ranks."""

    shape: str = "llama-60m"
    rank: int = 128
    batch: int = 128
    length: int = 256
    graphs: bool = True
    eval_rows: int = 0
    """Rows of held-out tokens that are evaluated; 0: all."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a row of the table, its rate, seed and budget."""

    row: str
    rate: float
    seed: int
    tokens: int


@dataclass(frozen=True)
class Data:
    """Tokens as rows [n, length], int16 on the device."""

    held: Tensor
    train: Tensor
    vocabulary: int

    @staticmethod
    def of(flat: np.ndarray, *, num_held: int, length: int, vocabulary: int) -> Data:
        """From held-out tokens followed by those to train on."""
        assert vocabulary <= 2**15, "ids are kept in 16 bits"
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def rows(part: np.ndarray) -> Tensor:
            cut = part[: len(part) // length * length].reshape(-1, length)
            return torch.from_numpy(cut.astype(np.int16)).to(device)

        return Data(rows(flat[:num_held]), rows(flat[num_held:]), vocabulary)

    def batches(self, *, rows: int, seed: int) -> Iterator[Tensor]:
        """Rows [rows, length] without end, in a new order in each pass over the data."""
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed(seed * 1009 + epoch)
            order = torch.randperm(len(self.train), generator=generator).to(self.train.device)
            for begin in range(0, len(order) - rows + 1, rows):
                yield self.train[order[begin : begin + rows]]
            epoch += 1


def train_once(run: Run, setting: Setting, data: Data) -> dict[str, Any]:
    """Train and measure; the words of the row's line."""
    device = data.train.device
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = max(2, math.ceil(run.tokens / (setting.batch * setting.length)))
    model = _Model(run, setting, data, device=device)
    optimizer, schedule, restart = _optimizer(run, setting, model, steps=steps)
    layerwise = bool(ROWS[run.row][1].get("layerwise"))
    passes = _Passes(model, setting, device=device, graphs=setting.graphs and not layerwise)
    source = data.batches(rows=setting.batch, seed=run.seed)
    setup_s = time.perf_counter() - began
    warm = min(NUM_WARMUP, steps - 1)
    started = time.perf_counter()
    for number in range(steps):
        if number == warm:
            _wait(device)
            warm_s, started = time.perf_counter() - started, time.perf_counter()
        passes(next(source))
        model.take_gradients_()
        clip_grad_norm_(model.stepped, 1.0)
        optimizer.step()
        schedule.step()
        model.give_weights_()
        if restart is not None:
            restart(number + 1)
    _wait(device)
    seconds = time.perf_counter() - started
    state = [tensor for one in optimizer.state.values() for tensor in _flat(one)]
    peak = _peak_gib(device)
    loss = passes.held_out_loss(data.held, rows=setting.eval_rows)
    reduced = ROWS[run.row][1].get("method") or ROWS[run.row][2] or run.row == "galore_torch"
    return {
        "perplexity": round(math.exp(loss), 3) if math.isfinite(loss) and loss < 30 else None,
        "tokens_per_s": round((steps - warm) * setting.batch * setting.length / seconds),
        "optimizer_mib": round(sum(tensor.nbytes for tensor in state) / 2**20, 1),
        **peak,
        "row_rank": ROWS[run.row][1].get("rank", setting.rank) if reduced else None,
        "num_trained": sum(p.numel() for p in model.low),
        "num_parameters": sum(p.numel() for p in model.net.parameters()),
        "steps": steps,
        "graphs": passes.graph is not None,
        "note": passes.why_not,
        "seconds": round(seconds, 2),
        "setup_s": round(setup_s + warm_s, 2),
        "wall_s": round(time.perf_counter() - began, 2),
    }


class _Model:
    """A Llama that computes in bfloat16, and the float32 weights that are stepped."""

    def __init__(self, run: Run, setting: Setting, data: Data, *, device: torch.device) -> None:
        optim, adapter = ROWS[run.row][1:]
        net = _llama(setting.shape, data.vocabulary, seed=run.seed, device=device)
        generator = torch.Generator().manual_seed(run.seed)
        if adapter.get("kind") == "factorised":
            factorise_(net, ["all-linear"], rank=setting.rank)
            for name, linear in factorised(net).items():
                linear.reset_parameters_(name, generator=generator)
        elif adapter:
            words = {**adapter, "rank": setting.rank, "alpha": 2.0 * setting.rank}
            adapt_(net, Adapter.model_validate(words), dtype=torch.float32, generator=generator)
        ids = torch.arange(setting.length, device=device)[None]
        hidden = torch.zeros(1, setting.length, 1, device=device, dtype=torch.bfloat16)
        self.angles = net.model.rotary_emb(hidden, ids)
        learnt = {name: p for name, p in net.named_parameters() if p.requires_grad}
        masters = {name: nn.Parameter(p.detach().clone()) for name, p in learnt.items()}
        net.to(torch.bfloat16)
        fuse_(net, net.model, dtype=torch.bfloat16)
        self.net, self.low = net.train(), list(learnt.values())
        self.has_masters = not optim.get("layerwise")
        self.named = masters if self.has_masters else learnt
        self.stepped = list(self.named.values())
        if self.has_masters:
            for p in self.stepped:
                p.grad = torch.empty_like(p)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of rows [rows, length] of ids."""
        hidden = self.net.model.embed_tokens(ids)
        for layer in self.net.model.layers:
            made = layer(hidden, attention_mask=None, position_embeddings=self.angles)
            hidden = made[0] if isinstance(made, tuple) else made
        hidden = self.net.model.norm(hidden)
        labels = torch.full_like(ids, IGNORE)
        labels[:, :-1] = ids[:, 1:]
        num_targets = ids.shape[0] * (ids.shape[1] - 1)
        total = causal_lm_loss(
            hidden, labels, self.net.lm_head, chunk=16384, num_targets=num_targets
        )[0]
        return total / num_targets

    @torch.no_grad()
    def take_gradients_(self) -> None:
        """Gradients of the copy, for the weights that are stepped."""
        if self.has_masters:
            torch._foreach_copy_([p.grad for p in self.stepped], [p.grad for p in self.low])

    @torch.no_grad()
    def give_weights_(self) -> None:
        """Stepped weights, for the copy."""
        if self.has_masters:
            torch._foreach_copy_(self.low, self.stepped)

    @torch.no_grad()
    def restarted(self, seed: int, restart: int) -> list[Tensor]:
        """Merge adapters and begin them anew; the stepped parameters that began again."""
        places = {id(p): place for place, p in enumerate(self.low)}
        begun = []
        for p in merge_and_restart_(self.net, seed=seed, restart=restart):
            master = self.stepped[places[id(p)]]
            master.copy_(p)
            begun.append(master)
        return begun


class _Passes:
    """Loss and gradients of one batch after another, replayed where that can be captured."""

    def __init__(
        self, model: _Model, setting: Setting, *, device: torch.device, graphs: bool
    ) -> None:
        self.model, self.rows = model, setting.batch
        self.ids = torch.zeros(setting.batch, setting.length, dtype=torch.int64, device=device)
        self.graph: Any = None
        self.why_not: str | None = None
        if graphs and device.type == "cuda":
            try:
                self.graph = self._captured()
            except Exception as error:  # it runs without, which the row's line says
                self.why_not = f"no CUDA graph: {error}"[:200]
                torch.cuda.synchronize()

    def __call__(self, ids: Tensor) -> None:
        self.ids.copy_(ids)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._pass()

    def _pass(self) -> None:
        for p in self.model.low:
            p.grad = None
        self.model.loss(self.ids).backward()  # type: ignore[no-untyped-call]

    def _captured(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._pass()
            for p in self.model.low:
                p.grad = None
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._pass()
        return graph

    @torch.no_grad()
    def held_out_loss(self, held: Tensor, *, rows: int) -> float:
        """Mean loss of held-out rows."""
        held = held[: rows or len(held)]
        self.model.net.eval()
        total = torch.zeros((), device=held.device, dtype=torch.float64)
        for begin in range(0, len(held), self.rows):
            part = held[begin : begin + self.rows].long()
            total += self.model.loss(part).double() * len(part)
        self.model.net.train()
        return float(total) / max(1, len(held))


def _llama(shape: str, vocabulary: int, *, seed: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    name = "llama-9m" if shape == "tiny" else shape
    words = {k: v for k, v in config_of(f"builtin:{name}").items() if k != "architectures"}
    if shape == "tiny":
        words |= {
            "hidden_size": TINY.hidden,
            "intermediate_size": TINY.intermediate,
            "num_attention_heads": TINY.num_heads,
            "num_key_value_heads": TINY.num_heads,
            "num_hidden_layers": TINY.num_layers,
        }
    torch.manual_seed(seed)
    config = LlamaConfig(**{**words, "vocab_size": vocabulary})
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def _optimizer(
    run: Run, setting: Setting, model: _Model, *, steps: int
) -> tuple[torch.optim.Optimizer, Schedule, Callable[[int], None] | None]:
    """The row's optimiser and schedule, and what ReLoRA does after an update."""
    words = ROWS[run.row][1]
    if run.row == "galore_torch":
        made = _galore_torch(model, run.rate, setting.rank)
        schedule = Schedule(
            made,
            name="cosine",
            total_steps=steps,
            floor_ratio=0.1,
            warmup_steps=math.ceil(0.1 * steps),
        )
        return made, schedule, None
    low = {"refresh_every": GAP} if "method" in words else {}
    if low and "rank" not in words:
        low["rank"] = setting.rank
    every = max(1, steps // (NUM_RESTARTS + 1))
    if "restart_every" in words:
        words = {**words, "restart_every": every, "restart_warmup_steps": max(1, every // 10)}
    optim = Optim.model_validate(
        {"learning_rate": run.rate, **words, **low, "warmup_ratio": 0.1, "floor_ratio": 0.1}
    )
    optimizer, schedule = build(model.named, optim, total_steps=steps, seed=run.seed)
    if optim.restart_every is None:
        return optimizer, schedule, None

    def restart(num_updates: int) -> None:
        if num_updates % every == 0 and num_updates < steps:
            for p in model.restarted(run.seed, num_updates // every):
                optimizer.state.pop(p, None)

    return optimizer, schedule, restart


def _galore_torch(model: _Model, rate: float, rank: int) -> torch.optim.Optimizer:
    """The peer's own optimiser, on the matrices that ours projects."""
    from galore_torch import GaLoreAdamW

    chosen = [p for name, p in model.named.items() if ".layers." in name and p.dim() == 2]
    ids = {id(p) for p in chosen}
    rest = [p for p in model.stepped if id(p) not in ids]
    low = {
        "params": chosen,
        "rank": rank,
        "update_proj_gap": GAP,
        "scale": 0.25,
        "proj_type": "std",
    }
    made: torch.optim.Optimizer = GaLoreAdamW(
        [{"params": rest}, low], lr=rate, eps=1e-8, no_deprecation_warning=True
    )
    return made


def _flat(value: Any) -> list[Tensor]:
    """Tensors of a state, also those that the peer keeps in an object."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _flat(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _flat(v)]
    inside = getattr(value, "ortho_matrix", None)
    return [] if inside is None else _flat(inside)


def _peak_gib(device: torch.device) -> dict[str, float | None]:
    if device.type != "cuda":
        return {"peak_gib": None, "reserved_gib": None}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give back what a run has left behind: graphs and their memory."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
