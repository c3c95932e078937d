"""Loss curves of the same steps in nibble and in plain transformers, on real data.

    python bench/curve.py --model FOLDER --data alpaca.json.xz [--steps 200] [--rows 8]
                          [--length 512] [--rate 2e-4]

Both train LoRA r=16 on all linears of an nf4 base with double-quantised scales. hf is transformers
and peft as they come, with torch's AdamW and clipping at 1. The rows of every step, their order,
the values of the packed base, the first values of the adapters and the schedule (cosine after a
tenth) are the same, so the curves differ by rounding alone. How much rounding does is measured as
well: hf runs a second time with its arithmetic in float32, and nibble's distance from that run is
compared with hf's own. Two curves are called alike if that ratio of mean distances is at most
--bound. A third run of hf packs the base with bitsandbytes, whose 8-bit scales are grouped
otherwise (and whose blocks are, where rows are no multiple of 64): that curve is shown and not
judged, as it is of another base.

Prints a JSON line every tenth of the steps, and one at the end. FOLDER is a Llama in transformers'
layout; a GGUF file is written as one first. --tiny makes a random one.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parent
IGNORE = -100
RANK = 16


class Step(NamedTuple):
    """Rows of one step, padded: ids, labels as transformers wants them (not shifted), mask."""

    ids: Tensor
    labels: Tensor
    mask: Tensor


class Same(NamedTuple):
    """What all runs begin with, by nibble's names: the unpacked base (bfloat16) and adapters."""

    base: dict[str, Tensor]
    adapters: dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="alpaca's format, .json or .json.xz")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--bound", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="JSON of the three curves")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            options.model = write_tiny(Path(folder))
            options.steps, options.rows, options.length = 12, 2, 64
        else:
            options.model = in_bfloat16(options.model, Path(folder) / "model")
        steps = make_steps(options)
        curves = {}
        same = Same({}, {})
        for name in ("nibble", "hf", "hf float32", "hf bitsandbytes"):
            began = time.perf_counter()
            if name == "nibble":
                curves[name] = nibble_curve(options, steps, Path(folder), same)
            else:
                curves[name] = hf_curve(options, steps, same, name)
            seconds = round(time.perf_counter() - began, 1)
            say(bench="curve", stack=name, seconds=seconds, **ends(curves[name]))
    compare(options, curves)


def ends(curve: Sequence[float]) -> dict[str, float]:
    """Means of the first and the last tenth."""
    tenth = max(1, len(curve) // 10)
    return {
        "first_tenth": round(statistics.mean(curve[:tenth]), 4),
        "last_tenth": round(statistics.mean(curve[-tenth:]), 4),
    }


def compare(options: argparse.Namespace, curves: dict[str, list[float]]) -> None:
    """Print how far apart the curves are."""
    if options.out is not None:
        options.out.write_text(json.dumps(curves), encoding="utf-8")
    ours, plain, exact = curves["nibble"], curves["hf"], curves["hf float32"]
    tenth = max(1, len(ours) // 10)
    for begin in range(0, len(ours), tenth):
        part = slice(begin, begin + tenth)
        means = {name: round(statistics.mean(curve[part]), 4) for name, curve in curves.items()}
        say(bench="curve part", steps=f"{begin + 1}-{begin + len(ours[part])}", **means)
    from_exact = distance(ours, exact)
    rounding = distance(plain, exact)
    say(
        bench="curve compared",
        steps=len(ours),
        nibble_to_hf=distance(ours, plain),
        nibble_to_exact=from_exact,
        hf_to_exact=rounding,
        ratio=round(from_exact / max(rounding, 1e-9), 3),
        bias=round(statistics.mean(a - b for a, b in zip(ours, plain, strict=True)), 6),
        largest=round(max(abs(a - b) for a, b in zip(ours, plain, strict=True)), 5),
        alike=from_exact <= options.bound * max(rounding, 1e-6),
    )


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two curves."""
    return round(statistics.mean(abs(a - b) for a, b in zip(one, other, strict=True)), 6)


# ---------------------------------------------------------------- the same data for both


def make_steps(options: argparse.Namespace) -> list[Step]:
    """The rows of all steps: instruction, input and answer, the answer learnt."""
    from transformers import AutoTokenizer

    if options.tiny:
        generator = torch.Generator().manual_seed(0)
        size = (options.rows, options.length)
        made = [torch.randint(3, 256, size, generator=generator) for _ in range(options.steps)]
        return [Step(ids, ids.clone(), torch.ones_like(ids)) for ids in made]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    packed = options.data.read_bytes()
    examples = json.loads(lzma.decompress(packed) if options.data.suffix == ".xz" else packed)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    rows = iter(_row(tokenizer, examples[i], options.length) for i in order)
    return [_padded([next(rows) for _ in range(options.rows)]) for _ in range(options.steps)]


def _row(tokenizer: Any, example: dict[str, str], length: int) -> tuple[list[int], int]:
    """Ids, and how many of them are the question."""
    given = f"\n\nInput: {example['input']}" if example.get("input") else ""
    question = f"Instruction: {example['instruction']}{given}\n\nResponse: "
    ids = tokenizer(question, add_special_tokens=False).input_ids[: length - 8]
    answer = tokenizer(example["output"], add_special_tokens=False).input_ids
    return [*ids, *answer, tokenizer.eos_token_id][:length], len(ids)


def _padded(rows: Sequence[tuple[list[int], int]]) -> Step:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for number, (row, num_question) in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, num_question : len(row)] = torch.tensor(row[num_question:])
        mask[number, : len(row)] = 1
    return Step(ids, labels, mask)


# ---------------------------------------------------------------- nibble


class Steps:
    """What the loop asks for, from the list."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        from nibble.data import Batch

        for step in self.steps:
            labels = step.labels.roll(-1, dims=1)
            labels[:, -1] = IGNORE
            lengths = step.mask.sum(1).tolist()
            yield [
                Batch(
                    input_ids=step.ids,
                    labels=labels,
                    position_ids=None,
                    attention_mask=None if bool(step.mask.all()) else step.mask,
                    num_targets=int((labels != IGNORE).sum()),
                    num_tokens=int(step.mask.sum()),
                    doc_lengths=tuple((int(n),) for n in lengths),
                )
            ]


def nibble_curve(
    options: argparse.Namespace, steps: Sequence[Step], folder: Path, same: Same
) -> list[float]:
    """Losses of nibble's loop; `same` gets what it began with."""
    from loop_run import loop_run

    from nibble.nn.adapters import adapters
    from nibble.nn.quant import dense_weight
    from nibble.optim import Schedule
    from nibble.place.activations import Activations
    from nibble.place.single import one_device
    from nibble.spec.config import Recipe
    from nibble.use.assemble import assemble, fill

    recipe = Recipe.model_validate(
        {
            "model": {"path": str(options.model)},
            "quant": {"format": "nf4", "cache": False},
            "adapter": {"kind": "lora", "rank": RANK, "alpha": RANK, "targets": ["all-linear"]},
            "optim": {"learning_rate": options.rate},
            "place": {"device": "auto"},
        }
    )
    place = one_device(recipe.place)
    assembly = assemble(recipe)
    fill(assembly, place, activations=Activations.of(recipe.train))
    for name, adapter in adapters(assembly.model).items():
        same.adapters[f"{name}.lora_A"] = adapter.lora_A.detach().cpu().clone()
        weight = dense_weight(adapter.base, torch.bfloat16)
        same.base[f"{name}.weight"] = weight.detach().cpu().clone()
    run = loop_run(assembly, place, folder)
    run.state.schedule = Schedule(
        run.state.optimizer, name="cosine", total_steps=len(steps), warmup_steps=_warmup(steps)
    )
    return [float(run.step(batches).loss) for batches in Steps(steps)]


def _warmup(steps: Sequence[Step]) -> int:
    return max(1, len(steps) // 10)


# ---------------------------------------------------------------- transformers


def hf_curve(
    options: argparse.Namespace, steps: Sequence[Step], same: Same, name: str
) -> list[float]:
    """Losses of a plain loop over transformers and peft."""
    from peft import LoraConfig, get_peft_model

    exact = name == "hf float32"
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    net = _net(options.model, same, name, device=device)
    net.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    net = get_peft_model(net, lora).train()
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for own, value in same.adapters.items():
            parameters[f"base_model.model.{own}.default.weight"].copy_(value)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    losses = []
    for number, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = options.rate * _factor(number, steps)
        with torch.autocast(net.device.type, torch.bfloat16, enabled=not exact):
            loss = net(
                input_ids=step.ids.to(device),
                labels=step.labels.to(device),
                attention_mask=step.mask.to(device),
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _net(model: Path, same: Same, name: str, *, device: str) -> Any:
    """transformers' model: with the unpacked base, or packed by bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    load = AutoModelForCausalLM.from_pretrained
    if name == "hf bitsandbytes":
        words = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return load(model, dtype=torch.bfloat16, quantization_config=words, device_map={"": device})
    dtype = torch.float32 if name == "hf float32" else torch.bfloat16
    net = load(model, dtype=dtype).to(device)
    with torch.no_grad():
        for own, value in same.base.items():
            net.get_parameter(own).copy_(value)
    return net


def _factor(number: int, steps: Sequence[Step]) -> float:
    """The rate's share at an update: a cosine after a linear warm-up from 0."""
    warmup = _warmup(steps)
    if number < warmup:
        return number / warmup
    return 0.5 * (1 + math.cos(math.pi * (number - warmup) / (len(steps) - warmup)))


def in_bfloat16(model: Path, folder: Path) -> Path:
    """A model's weights and tokenizer as transformers' folder, so that all runs quantise the same
    numbers, whatever they compute in. nibble unpacks a GGUF file: some versions of transformers
    leave it packed, and those models cannot be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model.suffix == ".gguf":
        from nibble.models.gguf_cache import read_config, read_tokenizer
        from nibble.weights.gguf_source import GgufSource

        net = AutoModelForCausalLM.from_config(read_config(model), dtype=torch.bfloat16)
        source = GgufSource(model).bind(net)
        parameters = dict(net.named_parameters())
        with torch.no_grad():
            for name in source.entries():
                value = source.read(name)
                assert isinstance(value, Tensor)
                parameters.pop(name).copy_(value)
        assert not parameters or net.config.tie_word_embeddings, list(parameters)
        tokenizer = read_tokenizer(model)
    else:
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(model)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny(folder: Path) -> Path:
    """A random Llama of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
    )
    path = folder / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    from peers import write_tokenizer

    write_tokenizer(path, 512)
    return path


def say(**values: Any) -> None:
    """One JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    # bench/ has a kernels.py, and stacks look for a package of that name: it comes last.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != BENCH] + [str(BENCH)]
    main()
