"""How well each optimiser pretrains: perplexity on held-out tokens, memory, speed; one row each.

    python bench/pretrain_quality.py prepare --books FOLDER --tokenizer FOLDER --out tokens.bin
    python bench/pretrain_quality.py table --data tokens.bin --tokens 300e6 --jobs 3
    python bench/pretrain_quality.py row galore-svd --data tokens.bin --rate 1e-2 --tokens 20e6

`prepare` tokenises books on a CPU and packs as many tokens as fit into --max-mib (uint16, LZMA; the
held-out ones first). `table` is the protocol, the same for every row: a search over learning rates,
sqrt(10) apart, up and down from the row's guess while it gets better, with --tune-tokens each;
then one run with the best rate and --tokens. --jobs rows share the device at a time (tokens/s and
peaks are then those of a shared device; measure speed with --jobs 1). Each run prints a JSON line.

Weights are float32 and computed with in bf16 (autocast), so that rounding of weights is no part of
the comparison; rates warm up over a tenth and end at a tenth (cosine); seeds fix weights, order and
noise. A step is --batch rows of --length tokens.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nibble.nn.adapters import adapt_
from nibble.nn.factorised import factorise_, factorised
from nibble.nn.loss import causal_lm_loss
from nibble.optim import Schedule, build, clip_grad_norm_
from nibble.spec.builtin_models import SHAPES, config_of
from nibble.spec.config import Adapter, Optim
from nibble.train.restarts import restart_every_

GAP = 200
BESIDE = ("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm")
LORA = {"kind": "lora", "targets": ["all-linear"], "modules_to_save": list(BESIDE)}
# name -> (first guess of the rate, optim, adapter); ranks are added where a row has one
ROWS: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "adamw": (1e-3, {}, {}),
    "adamw8bit": (1e-3, {"name": "adamw8bit"}, {}),
    "adafactor": (1e-3, {"name": "adafactor-momentum"}, {}),
    "galore_torch": (1e-2, {}, {}),
    "galore-svd": (1e-2, {"method": "galore"}, {}),
    "galore-randomised": (1e-2, {"method": "galore", "basis": "randomised"}, {}),
    "galore8bit-layerwise": (1e-2, {"method": "galore8bit", "layerwise": True}, {}),
    "q-galore": (1e-2, {"method": "q-galore"}, {}),
    "fira": (1e-2, {"method": "fira"}, {}),
    "apollo": (1e-2, {"method": "apollo"}, {}),
    "apollo-mini": (1e-2, {"method": "apollo-mini", "rank": 1}, {}),
    "lora": (3e-3, {}, LORA),
    "relora": (3e-3, {"restart_every": 1000, "restart_warmup_steps": 50}, LORA),
    "low-rank": (3e-3, {}, {"kind": "factorised"}),
}


def prepare(arguments: argparse.Namespace) -> None:
    """Tokenise, validation first, and write as much of training as fits."""
    from tokenizers import Tokenizer

    folder = Path(arguments.tokenizer)
    file = folder if folder.is_file() else folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    books = Path(arguments.books)
    held = _tokens(tokenizer, [books / "classics_val.txt.xz"], limit=arguments.eval_tokens)
    limit = arguments.max_mib * 2**20
    packed, train = b"", np.empty(0, dtype=np.uint16)
    parts = sorted(books.glob("classics_train_*.txt.xz"))
    whole = _tokens(tokenizer, parts, limit=arguments.max_tokens)
    size = len(whole)
    while True:  # LZMA's share varies little: two or three tries
        train = whole[:size]
        packed = lzma.compress(np.concatenate([held, train]).tobytes(), preset=4)
        if len(packed) <= limit:
            break
        size = int(size * limit / len(packed) * 0.99)
    header = {"num_eval": len(held), "num_train": len(train),
              "vocabulary": tokenizer.get_vocab_size()}  # fmt: skip
    Path(arguments.out).write_bytes(json.dumps(header).encode() + b"\n" + packed)
    print(json.dumps({**header, "mib": round(len(packed) / 2**20, 1)}), flush=True)


def _tokens(tokenizer: Any, files: list[Path], *, limit: int) -> np.ndarray:
    """Tokens of documents, each ended by the tokenizer's </s> (id 2)."""
    found: list[np.ndarray] = []
    count = 0
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as stream:
            documents = stream.read().split("<|endofdoc|>\n")
        for document in documents:
            pieces = [document[i : i + 100_000] for i in range(0, len(document), 100_000)]
            for made in tokenizer.encode_batch(pieces, add_special_tokens=False):
                found.append(np.asarray(made.ids, dtype=np.uint16))
                count += len(made.ids)
            found.append(np.asarray([2], dtype=np.uint16))
            if count >= limit:
                return np.concatenate(found)[:limit]
    return np.concatenate(found)[:limit]


def load(path: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Held-out tokens, training tokens, size of the vocabulary."""
    header, _, packed = Path(path).read_bytes().partition(b"\n")
    told = json.loads(header)
    flat = np.frombuffer(lzma.decompress(packed), dtype=np.uint16)
    return flat[: told["num_eval"]], flat[told["num_eval"] :], told["vocabulary"]


def batches(tokens: np.ndarray, *, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Rows [rows, length] without end, in a new order in each pass over the data."""
    table = tokens[: len(tokens) // length * length].reshape(-1, length)
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(table))
        for begin in range(0, len(order) - rows + 1, rows):
            chosen = table[order[begin : begin + rows]].astype(np.int64)
            yield torch.from_numpy(chosen)
        epoch += 1


def make_model(shape: str, vocabulary: int, *, seed: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = {k: v for k, v in config_of(f"builtin:{shape}").items() if k != "architectures"}
    torch.manual_seed(seed)
    config = LlamaConfig(**{**words, "vocab_size": vocabulary})
    model: nn.Module = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return model.to(device)


def galore_torch_optimizer(model: nn.Module, rate: float, rank: int) -> torch.optim.Optimizer:
    """The peer's own optimiser, on the matrices that ours projects."""
    from galore_torch import GaLoreAdamW

    chosen = [p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
    ids = {id(p) for p in chosen}
    rest = [p for p in model.parameters() if id(p) not in ids]
    low = {"params": chosen, "rank": rank, "update_proj_gap": GAP, "scale": 0.25,
           "proj_type": "std"}  # fmt: skip
    made: torch.optim.Optimizer = GaLoreAdamW(
        [{"params": rest}, low], lr=rate, no_deprecation_warning=True
    )
    return made


def row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one row once and measure it."""
    guess, optim_words, adapter_words = ROWS[arguments.row]
    rate = arguments.rate or guess
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held, tokens, vocabulary = load(arguments.data)
    model = make_model(arguments.shape, vocabulary, seed=arguments.seed, device=device)
    steps = math.ceil(arguments.tokens / (arguments.batch * arguments.length))
    generator = torch.Generator().manual_seed(arguments.seed)
    rank = arguments.rank
    if adapter_words.get("kind") == "factorised":
        factorise_(model, ["all-linear"], rank=rank)
        for name, linear in factorised(model).items():
            linear.reset_parameters_(name, generator=generator)
    elif adapter_words:
        adapter = Adapter.model_validate({**adapter_words, "rank": rank, "alpha": 2.0 * rank})
        adapt_(model, adapter, dtype=torch.float32, generator=generator)
    low = {"refresh_every": GAP} if "method" in optim_words else {}
    if low and "rank" not in optim_words:
        low["rank"] = rank
    warmup = {"warmup_ratio": 0.1, "floor_ratio": 0.1}
    optim = Optim.model_validate({"learning_rate": rate, **optim_words, **low, **warmup})
    schedule: Schedule
    if arguments.row == "galore_torch":
        optimizer = galore_torch_optimizer(model, rate, rank)
        schedule = Schedule(optimizer, name="cosine", total_steps=steps, floor_ratio=0.1,
                            warmup_steps=math.ceil(0.1 * steps))  # fmt: skip
    else:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer, schedule = build(trained, optim, total_steps=steps, seed=arguments.seed)
    if optim.restart_every is not None:
        every = min(optim.restart_every, max(1, steps // 5))
        restart_every_(every, model=model, optimizer=optimizer, schedule=schedule,
                       seed=arguments.seed)  # fmt: skip
        schedule.restart_every = every
    found = _train(model, optimizer, schedule, tokens, held, arguments, steps=steps, device=device)
    state = [v for s in optimizer.state.values() for v in _flat(s)]
    projectors = sum(t.nbytes for t in state)
    return {"row": arguments.row, "shape": arguments.shape, "rate": rate, "seed": arguments.seed,
            "tokens": steps * arguments.batch * arguments.length, "steps": steps,
            "rank": 1 if arguments.row == "apollo-mini" else rank if low or adapter_words
            or arguments.row == "galore_torch" else None,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "optimizer_mib": round(projectors / 2**20, 1), **found}  # fmt: skip


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


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    tokens: np.ndarray,
    held: np.ndarray,
    arguments: argparse.Namespace,
    *,
    steps: int,
    device: str,
) -> dict[str, Any]:
    source = batches(tokens, rows=arguments.batch, length=arguments.length, seed=arguments.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for number in range(steps):
        _loss(model, next(source), device).backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if arguments.verbose and number % 100 == 0:
            held_now = evaluate(model, held[: 2**16], arguments, device)
            told = {"row": arguments.row, "step": number, "perplexity": round(held_now, 2)}
            print(json.dumps(told), file=sys.stderr, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else None
    return {
        "perplexity": round(evaluate(model, held, arguments, device), 3),
        "tokens_per_s": round(steps * arguments.batch * arguments.length / seconds),
        "peak_gib": None if peak is None else round(peak, 2),
        "seconds": round(seconds, 1),
    }


def _loss(model: nn.Module, ids: Tensor, device: str) -> Tensor:
    """Mean loss of a batch of rows."""
    ids = ids.to(device, non_blocking=True)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    num_targets = labels[:, :-1].numel()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.model(input_ids=ids, use_cache=False)[0]  # type: ignore[operator]
        head: Any = model.lm_head
        total = causal_lm_loss(hidden, labels, head, chunk=8192, num_targets=num_targets)[0]
    return total / num_targets


@torch.no_grad()
def evaluate(
    model: nn.Module, held: np.ndarray, arguments: argparse.Namespace, device: str
) -> float:
    """Perplexity of the held-out tokens."""
    model.eval()
    length = arguments.length
    table = held[: len(held) // length * length].reshape(-1, length)
    total, count = 0.0, 0
    for begin in range(0, len(table), arguments.batch):
        part = torch.from_numpy(table[begin : begin + arguments.batch].astype(np.int64))
        total += float(_loss(model, part, device)) * len(part)
        count += len(part)
    model.train()
    return math.exp(min(total / max(count, 1), 50.0))


def run_row(arguments: argparse.Namespace, name: str, *, rate: float, tokens: float) -> float:
    """One row in a process of its own; prints its line and returns its perplexity."""
    words = [sys.executable, __file__, "row", name, "--data", arguments.data,
             "--rate", repr(rate), "--tokens", repr(tokens), "--shape", arguments.shape,
             "--rank", str(arguments.rank), "--batch", str(arguments.batch),
             "--length", str(arguments.length), "--seed", str(arguments.seed)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(json.dumps({"row": name, "rate": rate, "failed": reason[-300:]}), flush=True)
        return math.inf
    print(lines[-1], flush=True)
    found: float = json.loads(lines[-1])["perplexity"]
    return found if math.isfinite(found) else math.inf


def tuned(arguments: argparse.Namespace, name: str) -> None:
    """Search for the rate, then the long run."""
    tried: dict[int, float] = {}

    def ask(place: int) -> float:
        if place not in tried:
            rate = ROWS[name][0] * 10 ** (place / 2)
            tried[place] = run_row(arguments, name, rate=rate, tokens=arguments.tune_tokens)
        return tried[place]

    best = 0
    for direction in (1, -1):
        ask(best)
        while len(tried) < arguments.max_tries and ask(best + direction) < tried[best]:
            best += direction
    rate = ROWS[name][0] * 10 ** (best / 2)
    run_row(arguments, name, rate=rate, tokens=arguments.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare")
    make.add_argument("--books", required=True)
    make.add_argument("--tokenizer", required=True)
    make.add_argument("--out", required=True)
    make.add_argument("--max-mib", type=float, default=58)
    make.add_argument("--max-tokens", type=int, default=60_000_000)
    make.add_argument("--eval-tokens", type=int, default=500_000)
    for name in ("row", "table"):
        part = commands.add_parser(name)
        part.add_argument("--data", required=True)
        part.add_argument("--shape", choices=list(SHAPES), default="llama-60m")
        part.add_argument("--tokens", type=float, default=300e6)
        part.add_argument("--rank", type=int, default=128)
        part.add_argument("--batch", type=int, default=128)
        part.add_argument("--length", type=int, default=256)
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--verbose", action="store_true")
        if name == "row":
            part.add_argument("row", choices=list(ROWS))
            part.add_argument("--rate", type=float)
        else:
            part.add_argument("--rows", default=",".join(ROWS))
            part.add_argument("--tune-tokens", type=float, default=20e6)
            part.add_argument("--max-tries", type=int, default=5)
            part.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments)
    elif arguments.command == "row":
        print(json.dumps(row(arguments)), flush=True)
    else:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda name: tuned(arguments, name), arguments.rows.split(",")))


if __name__ == "__main__":
    main()
