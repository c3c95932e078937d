"""One step of other stacks on the work that bench/step.py does, through their public interfaces.

    python bench/peers.py prepare FOLDER --case llama3-8b
    python bench/peers.py STACK WORK [WORK ...] --folder FOLDER [--packed rows.npz] [--profile]

STACK: hf (transformers, peft, bitsandbytes), liger (the same with liger-kernel's layers and loss),
unsloth. WORK: qlora:ROWSxTOKENS, packed:ROWS (real rows of packed_rows.py; unsloth gets them as its
packing does, one long row and the documents' lengths), lora:ROWSxTOKENS (a bf16 base),
full:ROWSxTOKENS (all weights, 8-bit AdamW). `prepare` writes an nf4 checkpoint of random weights
and a tokenizer of as many words; give a folder in memory (/dev/shm).

What they are given is what their own trainers set: LoRA r=16 on all linears, adapters and compute
in bf16 (unsloth: its default), activation checkpointing (unsloth: its own), autocast, paged 8-bit
AdamW. No gradient clipping and no schedule, which nibble's rows have. One JSON line for each work,
with the keys of step.py; a stack that is not installed says so in a line.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
BENCH = Path(__file__).resolve().parent
GIB = 2**30
NEEDS = {
    "hf": ("peft", "bitsandbytes"),
    "liger": ("peft", "bitsandbytes", "liger_kernel"),
    "unsloth": ("unsloth", "bitsandbytes"),
}
Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stack", choices=["prepare", *NEEDS])
    parser.add_argument("words", nargs="+", help="works, or the folder of prepare")
    parser.add_argument("--folder", help="what prepare wrote")
    parser.add_argument("--case", default="llama3-8b")
    parser.add_argument("--packed", help="what packed_rows.py wrote")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_intermixed_args()
    if options.stack == "prepare":
        prepare(options)
        return
    missing = [name for name in NEEDS[options.stack] if importlib.util.find_spec(name) is None]
    if missing:
        say(bench="step", stack=options.stack, failed=f"not installed: {', '.join(missing)}")
        return
    began = time.perf_counter()
    if options.stack == "unsloth":
        import unsloth  # noqa: F401 - before transformers, as it asks
    if options.stack == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    import_s = time.perf_counter() - began
    kinds: dict[str, list[str]] = {}
    for word in options.words:
        kind, _, size = word.partition(":")
        kinds.setdefault("qlora" if kind == "packed" else kind, []).append(f"{kind}:{size}")
    for kind, works in kinds.items():
        try:
            _works(options, kind, works, import_s=import_s)
        except Exception as error:  # one stack's trouble is a line, and not the end
            told = f"{type(error).__name__}: {error}"[:300]
            say(bench="step", stack=options.stack, work=kind, failed=told)
        _release()


def _works(options: argparse.Namespace, kind: str, works: list[str], *, import_s: float) -> None:
    """Build a model once and measure all works that it serves."""
    import torch

    began = time.perf_counter()
    model = UNSLOTH if options.stack == "unsloth" else PLAIN
    net = model[kind](options)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = _optimizer(trained, kind)
    about = {
        "stack": options.stack,
        "case": options.case,
        "num_trainable": sum(p.numel() for p in trained),
        "trains_in": str(trained[0].dtype),
        "import_s": round(import_s, 1),
        "build_s": round(time.perf_counter() - began, 1),
        "versions": _versions(),
    }
    for work in works:
        name, _, size = work.partition(":")
        inputs = _packed(options, int(size)) if name == "packed" else _random(net, size)

        def step(inputs: Iterator[dict[str, Any]] = inputs) -> Any:
            words = {key: _to_device(value, key) for key, value in next(inputs).items()}
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.autocast(device, torch.bfloat16):
                loss = net(**words).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        batch = f"{size}x{_packed_length(options)}" if name == "packed" else size
        _measure(options, step, {**about, "work": name, "batch": batch})


def _measure(options: argparse.Namespace, step: Step, about: dict[str, Any]) -> None:
    import torch
    from flops import shares, step_flops
    from packed_rows import micro_batches, tokens_a_row

    on_gpu = torch.cuda.is_available()
    _release()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows, length = map(int, about["batch"].split("x"))
    tokens = rows * length
    if about["work"] == "packed":
        tokens = round(rows * tokens_a_row(options.packed))
    walls_s = []
    loss: Any = None
    try:
        for number in range(options.warmup + options.steps):
            _wait()
            start = time.perf_counter()
            loss = step()
            _wait()
            if number >= options.warmup:
                walls_s.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        say(bench="step", **about, failed="out of memory", **_peak())
        return
    median_s = statistics.median(walls_s)
    lengths: Any = [[length]] * rows
    if about["work"] == "packed":
        lengths = next(micro_batches(options.packed, rows=rows)).doc_lengths
    flops = step_flops(
        _shape(options.case),
        doc_lengths=lengths,
        trains_base=about["work"] == "full",
        num_trained=about["num_trainable"],
    )
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    say(
        bench="step",
        **about,
        tokens_per_s=round(tokens / median_s, 1),
        **shares(flops, seconds=median_s, recomputed=1.0, device=device),
        step_ms=round(median_s * 1e3, 2),
        min_ms=round(min(walls_s) * 1e3, 2),
        max_ms=round(max(walls_s) * 1e3, 2),
        loss=round(float(loss), 4),
        **_peak(),
    )
    if options.profile:
        from kernel_times import kernel_times

        device = torch.device("cuda" if on_gpu else "cpu")
        words = {key: about[key] for key in ("stack", "work", "batch")}
        say(bench="profile", **words, **kernel_times(step, device=device))


# ---------------------------------------------------------------- models


def _qlora(options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return _with_lora(
        AutoModelForCausalLM.from_pretrained(
            options.folder, dtype="bfloat16", device_map={"": _device()}, attn_implementation="sdpa"
        )
    )


def _lora(options: argparse.Namespace) -> Any:
    return _with_lora(_from_config(options))


def _full(options: argparse.Namespace) -> Any:
    net = _from_config(options)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return net.train()


def _from_config(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(_device()):
        return AutoModelForCausalLM.from_config(
            _config(options.case), dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def _with_lora(net: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    net.requires_grad_(False)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net.enable_input_require_grads()
    net.config.use_cache = False
    words = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(net, words, autocast_adapter_dtype=False).train()


def _unsloth(options: argparse.Namespace) -> Any:
    import torch
    from unsloth import FastLanguageModel

    length = 16384
    net, _ = FastLanguageModel.from_pretrained(
        options.folder,
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        local_files_only=True,
    )
    net = FastLanguageModel.get_peft_model(
        net,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        use_gradient_checkpointing="unsloth",
        max_seq_length=length,
    )
    FastLanguageModel.for_training(net)
    return net


def _unsloth_has_none(_: argparse.Namespace) -> Any:
    raise NotImplementedError("not measured with unsloth: it wants a 16 GB checkpoint folder")


PLAIN = {"qlora": _qlora, "lora": _lora, "full": _full}
UNSLOTH = {"qlora": _unsloth, "lora": _unsloth_has_none, "full": _unsloth_has_none}


def _optimizer(trained: list[Any], kind: str) -> Any:
    import bitsandbytes
    import torch

    optim = bitsandbytes.optim
    if kind == "full" or not torch.cuda.is_available():
        return optim.AdamW8bit(trained, lr=1e-5)
    return optim.PagedAdamW8bit(trained, lr=1e-4)


def _config(case: str) -> Any:
    from transformers import AutoConfig

    words = {key: value for key, value in _shape(case).items() if key != "architectures"}
    return AutoConfig.for_model(**words, use_cache=False)


def _shape(case: str) -> dict[str, Any]:
    from random_model import CASES

    return CASES[case].config


def prepare(options: argparse.Namespace) -> None:
    """An nf4 checkpoint with double-quantised scales as bitsandbytes lays it out, and a tokenizer
    of as many words as the model has embeddings."""
    import bitsandbytes
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    folder = Path(options.words[0])
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(options.case)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, parameter in net.named_parameters():
        value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=_device())
        if parameter.dim() == 2:
            value.normal_(0.0, 0.02)
        if parameter.dim() == 2 and ".layers." in name:
            value, state = bitsandbytes.functional.quantize_4bit(
                value, quant_type="nf4", compress_statistics=True
            )
            for key, part in state.as_dict(packed=True).items():
                tensors[f"{name}.{key}"] = part.cpu()
        tensors[name] = value.cpu()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    words = {
        **_shape(options.case),
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(words))
    write_tokenizer(folder, config.vocab_size)
    size = (folder / "model.safetensors").stat().st_size
    say(bench="prepared", seconds=round(time.perf_counter() - began, 1), gib=round(size / GIB, 2))


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of `size` words: <s>, </s>, <pad>, <unk>, w4, w5, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    words |= {f"w{number}": number for number in range(4, size)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made_fast = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=131072, **special)
    made_fast.save_pretrained(str(folder))


# ---------------------------------------------------------------- inputs


def _random(net: Any, size: str) -> Iterator[dict[str, Any]]:
    """Random tokens, fresh ones for each step, every one a target."""
    import torch

    rows, length = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(0, net.config.vocab_size, (rows, length), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def _packed(options: argparse.Namespace, rows: int) -> Iterator[dict[str, Any]]:
    """Real rows; unsloth's packing lays them end to end and says how long the documents are."""
    import torch
    from packed_rows import micro_batches

    for some in micro_batches(options.packed, rows=rows):
        words = {"input_ids": some.ids, "labels": some.labels, "position_ids": some.positions}
        tensors = {key: torch.from_numpy(value) for key, value in words.items()}
        if options.stack == "unsloth":
            tensors = {key: value.reshape(1, -1) for key, value in tensors.items()}
            lengths = [n for one in some.doc_lengths for n in one]
            tensors["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        yield tensors


def _packed_length(options: argparse.Namespace) -> int:
    from packed_rows import micro_batches

    return int(next(micro_batches(options.packed, rows=1)).ids.shape[1])


def _to_device(value: Any, key: str) -> Any:
    return value if key == "packed_seq_lengths" else value.to(_device(), non_blocking=True)


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _peak() -> dict[str, float]:
    import torch

    if not torch.cuda.is_available():
        return {"allocated_gib": 0.0, "reserved_gib": 0.0}
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def say(**values: Any) -> None:
    """One JSON line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    # bench/ has a kernels.py, and stacks look for a package of that name: it comes last.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != BENCH] + [str(BENCH)]
    main()
