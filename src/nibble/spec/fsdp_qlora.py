"""The fsdp_qlora training script's command line as a recipe.

`python train.py --train_type qlora --dataset alpaca ...` means here what it means there: the same
defaults, the same train types (format x adapter, the table below), the same data. What differs, on
purpose: adapters go on o_proj too, gradients are weighted by tokens, every epoch has its own order,
DoRA's alpha and dropout count, and `max_steps` is exact. A flag that cannot be honoured is refused
by name; one that is given without effect too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nibble.errors import ConfigError

from . import datasets
from .fsdp_flags import FLAGS, Value, parse

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class TrainType:
    """Storage of the base and what is trained beside it."""

    format: str
    adapter: str


TRAIN_TYPES: dict[str, TrainType] = {
    "full": TrainType("none", "none"),
    "lora": TrainType("none", "lora"),
    "custom_lora": TrainType("none", "lora"),
    "qlora": TrainType("nf4", "lora"),
    "custom_qlora": TrainType("nf4", "lora"),
    "hqq_lora": TrainType("hqq", "lora"),
    "bnb_dora": TrainType("nf4", "dora"),
    "hqq_dora": TrainType("hqq", "dora"),
    "bnb_llama_pro": TrainType("nf4", "expand"),
    "hqq_llama_pro": TrainType("hqq", "expand"),
}
# fp32 weights under bf16 arithmetic: the adapters are fp32, the base is frozen.
PRECISIONS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "auto"),
    "bf16": ("bf16", "auto"),
    "fp16_autocast": ("fp16", "auto"),
    "bf16_autocast": ("bf16", "fp32"),
    "bf16_buffers_autocast": ("bf16", "auto"),
}
SINKS: dict[str, list[str]] = {
    "tqdm": ["progress"],
    "wandb": ["progress", "wandb"],
    "stdout": ["plain"],
}
TARGETS: dict[str, list[str]] = {"all": ["all-linear"], "default": ["q_proj", "v_proj"]}
LLAMA_PRO_NAME = re.compile(r"blk_exp-(\d+)-(\d+)/?$")


STRATEGIES: dict[str, dict[str, Any]] = {
    "full_shard": {"kind": "fsdp"},
    "shard_grad_op": {"kind": "fsdp", "shard": "grad-op"},
    "hybrid_full_shard": {"kind": "fsdp", "shard": "hybrid"},
    "ddp": {"kind": "ddp"},
}
"""What `place` says for each way to share."""


def translate(argv: Sequence[str]) -> dict[str, Any]:
    """A command line of that script as the sections of a recipe, for `load_recipe(None, base=...)`.

    Raises ConfigError for what `fsdp_flags.parse` refuses, and for flags that contradict each other
    or would have no effect.
    """
    flags = parse(argv)
    problems = [*_idle(flags), *_unsupported(flags)]
    if problems:
        raise ConfigError("; ".join(problems))
    kind = TRAIN_TYPES[str(flags["train_type"])]
    recipe: dict[str, Any] = {
        "model": {"path": flags["model_name"]},
        "data": _data(flags),
        "quant": {"format": kind.format},
        "adapter": _adapter(flags, kind),
        "optim": _optim(flags),
        "train": _train(flags, kind),
        "place": _place(flags),
        "report": {"sinks": SINKS[str(flags["log_to"])]},
        "output_dir": flags["output_dir"],
    }
    if kind.format == "hqq":
        recipe["quant"] |= {"bits": flags["n_bits"], "block": 64}
    if flags["log_to"] == "wandb":
        recipe["report"] |= {"project": flags["project_name"], "run_name": flags["name"]}
    return recipe


def _idle(flags: Flags) -> Iterator[str]:
    """Flags with a value of their own that the other flags make meaningless."""
    kind = TRAIN_TYPES[flags["train_type"]]
    profiles = flags["profile"]
    conditions: tuple[tuple[tuple[str, ...], bool, str], ...] = (
        (
            ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"),
            kind.adapter in ("lora", "dora"),
            "a lora or dora train type",
        ),
        (("n_bits",), kind.format == "hqq", "an hqq train type"),
        (("llama_pro_path",), kind.adapter == "expand", "a llama_pro train type"),
        (
            ("dataset_samples",),
            datasets.NAMED[flags["dataset"]].takes_samples,
            "alpaca_sample, dummy or orca_math",
        ),
        (("grad_norm",), flags["apply_gradient_clipping"], "--apply_gradient_clipping true"),
        (("wd",), flags["optimizer"] == "adamw", "--optimizer adamw"),
        (("project_name", "name"), flags["log_to"] == "wandb", "--log_to wandb"),
        (("wait_steps",), profiles and flags["repeat"] > 0, "--profile true --repeat 1"),
        (
            ("warmup_steps", "active_steps", "export_memory_timeline", "repeat"),
            profiles,
            "--profile true",
        ),
        (
            ("profiling_frequency",),
            profiles and flags["repeat"] == 0,
            "--profile true without --repeat",
        ),
    )
    for names, works, needed in conditions:
        for name in names:
            if not works and flags[name] != FLAGS[name].default:
                yield f"--{name} {_shown(flags[name])} has no effect: it works only with {needed}"


def _unsupported(flags: Flags) -> Iterator[str]:
    if flags["optimizer"] == "adadelta":
        yield "--optimizer adadelta is not supported: adamw, adam or sgd"
    if flags["train_type"] == "full" and flags["precision"] == "bf16_autocast":
        yield (
            "--precision bf16_autocast with --train_type full (fp32 weights, bf16 arithmetic) is "
            "not supported yet: bf16 or fp32"
        )
    if flags["max_steps"] > 0 and flags["num_epochs"] != 1:
        yield "--max_steps with --num_epochs counts within each epoch: leave --num_epochs out"
    if 0 < flags["max_steps"] < flags["gradient_accumulation_steps"]:
        yield (
            f"--max_steps {flags['max_steps']} is less than one update of "
            f"{flags['gradient_accumulation_steps']} passes"
        )
    path = flags["llama_pro_path"]
    if path is not None and not LLAMA_PRO_NAME.search(path):
        yield f"--llama_pro_path {path} does not end in blk_exp-OLD-NEW, the numbers of layers"
    elif path is not None and _num_new_blocks(path) < 1:
        yield f"--llama_pro_path {path} names no new layers"
    if flags["world_size"] < 1 and flags["world_size"] != -1:
        yield f"--world_size {flags['world_size']}: give a number of GPUs, or -1 for all"
    if flags["profile"] and flags["profile_memory"]:
        yield "--profile_memory is a profile of its own: use --export_memory_timeline instead"


def _data(flags: Flags) -> dict[str, Any]:
    named = datasets.NAMED[flags["dataset"]]
    rows = flags["dataset_samples"] if named.takes_samples else None
    data: dict[str, Any] = {
        "train": datasets.sources(flags["dataset"], num_rows=rows),
        "max_length": flags["context_length"],
    }
    if named.eval_rows is not None:
        data["eval_rows"] = named.eval_rows
    return data


def _adapter(flags: Flags, kind: TrainType) -> dict[str, Any]:
    adapter: dict[str, Any] = {"kind": kind.adapter}
    if kind.adapter in ("lora", "dora"):
        adapter |= {
            "rank": flags["lora_rank"],
            "alpha": flags["lora_alpha"],
            "dropout": flags["lora_dropout"],
            "targets": TARGETS[flags["lora_target_modules"]],
        }
    if flags["llama_pro_path"] is not None:
        adapter["num_new_blocks"] = _num_new_blocks(flags["llama_pro_path"])
    return adapter


def _place(flags: Flags) -> dict[str, Any]:
    """One GPU is one device, whatever the strategy; several share as it says."""
    if flags["world_size"] == 1:
        return {"kind": "single"}
    place = dict(STRATEGIES[flags["sharding_strategy"]])
    if flags["world_size"] > 0:
        place["num_devices"] = flags["world_size"]
    return place


def _num_new_blocks(path: str) -> int:
    found = LLAMA_PRO_NAME.search(path)
    return int(found.group(2)) - int(found.group(1)) if found else 0


def _optim(flags: Flags) -> dict[str, Any]:
    """Their AdamW has betas 0.9, 0.95 and eps 1e-5; their Adam and SGD have torch's defaults."""
    optim: dict[str, Any] = {
        "learning_rate": flags["lr"],
        "weight_decay": 0.0,
        "schedule": flags["lr_scheduler"],
        "max_grad_norm": flags["grad_norm"] if flags["apply_gradient_clipping"] else None,
    }
    if flags["optimizer"] == "adamw":
        optim |= {
            "name": "adamw",
            "betas": [0.9, 0.95],
            "eps": 1e-5,
            "weight_decay": flags["wd"],
        }
    elif flags["optimizer"] == "adam":  # AdamW without decay is Adam
        optim["name"] = "adamw"
    else:
        optim["name"] = flags["optimizer"]
    if flags["lr_scheduler"] != "constant":
        optim["warmup_ratio"] = 0.1
    if flags["lr_scheduler"] == "cosine":
        optim["floor_ratio"] = 0.1
    return optim


def _train(flags: Flags, kind: TrainType) -> dict[str, Any]:
    precision, adapter_precision = PRECISIONS[flags["precision"]]
    checkpointing = "full" if flags["use_gradient_checkpointing"] else "none"
    train: dict[str, Any] = {
        "precision": precision,
        "micro_batch_size": flags["batch_size"],
        "gradient_accumulation_steps": flags["gradient_accumulation_steps"],
        "activation_checkpointing": checkpointing,
        "seed": flags["seed"],
        "profile": _profile(flags),
    }
    if adapter_precision != "auto" and kind.adapter in ("lora", "dora"):
        train["adapter_precision"] = adapter_precision
    if flags["use_activation_cpu_offload"]:
        train["activation_offload"] = True
    if flags["max_steps"] > 0:
        train["max_steps"] = flags["max_steps"] // flags["gradient_accumulation_steps"]
    else:
        train["epochs"] = flags["num_epochs"]
    return train


def _profile(flags: Flags) -> dict[str, Any] | None:
    """Their profiler counts passes, nibble's counts updates."""
    if flags["profile_memory"]:
        return {"start_step": 1, "num_steps": 1, "memory": True}
    if not flags["profile"]:
        return None
    before = flags["profiling_frequency"] - flags["active_steps"]
    if flags["repeat"]:
        before = flags["wait_steps"] + flags["warmup_steps"]
    return {
        "start_step": max(before, 0) // flags["gradient_accumulation_steps"] + 1,
        "num_steps": max(flags["active_steps"] // flags["gradient_accumulation_steps"], 1),
        "memory": flags["export_memory_timeline"],
    }


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
