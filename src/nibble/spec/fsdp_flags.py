"""The command line of the fsdp_qlora training script: its flags, defaults and choices.

Facts of that script's last version (June 2024), one row a flag. `fixed` rows steer what nibble does
in one way only; they are accepted at these values and refused at others, with the reason. Reading a
command line costs microseconds: plain data, no argparse, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nibble.errors import ConfigError

from .texts import nearest, show

Value = str | int | float | bool | None

_MACHINES = "processes of one machine find each other; for more use nibble train --nodes --master"
_WRITTEN = "a profile is written to the run folder, trace and all"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag: its type is its default's (text where that is None)."""

    default: Value
    help: str
    choices: tuple[str, ...] = ()
    fixed: tuple[Value, ...] | None = None
    why: str = ""


GROUPS: Mapping[str, Mapping[str, Flag]] = {
    "What is trained": {
        "train_type": Flag(
            default="qlora",
            help="storage of the base and what is trained beside it",
            choices=(
                "full",
                "lora",
                "custom_lora",
                "qlora",
                "custom_qlora",
                "hqq_lora",
                "bnb_dora",
                "hqq_dora",
                "bnb_llama_pro",
                "hqq_llama_pro",
            ),
        ),
        "model_name": Flag(
            default="meta-llama/Llama-2-7b-hf", help="hub id or folder of the model"
        ),
        "llama_pro_path": Flag(
            default=None,
            help="expanded model NAME_blk_exp-OLD-NEW; nibble expands model_name by as many blocks",
        ),
        "n_bits": Flag(default=4, help="bits of the hqq types"),
        "lora_rank": Flag(default=64, help="rank of LoRA and DoRA"),
        "lora_alpha": Flag(default=16, help="the update is scaled by alpha / rank"),
        "lora_dropout": Flag(default=0.1, help="dropout on the adapter's input"),
        "lora_target_modules": Flag(
            default="all",
            help="all linears (o_proj too, which the script left out), or q_proj and v_proj",
            choices=("all", "default"),
        ),
    },
    "Data": {
        "dataset": Flag(
            default="alpaca_sample",
            help="a named data set",
            choices=("alpaca", "alpaca_sample", "dummy", "guanaco", "sql", "orca_math"),
        ),
        "dataset_samples": Flag(default=512, help="rows of alpaca_sample, dummy and orca_math"),
        "context_length": Flag(default=512, help="tokens in a row; longer ones are cut"),
    },
    "Loop": {
        "batch_size": Flag(default=1, help="rows in one pass"),
        "gradient_accumulation_steps": Flag(default=1, help="passes in one update"),
        "num_epochs": Flag(default=1, help="passes over the data"),
        "max_steps": Flag(default=-1, help="stop after this many passes; -1 is never"),
        "seed": Flag(default=42, help="of initialisation, order and dropout"),
        "precision": Flag(
            default="bf16",
            help="compute type",
            choices=("fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast"),
        ),
        "use_gradient_checkpointing": Flag(
            default=True, help="compute activations again in backward"
        ),
        "reentrant_checkpointing": Flag(
            default=False,
            help="accepted either way: nibble has one kind, without the memory bug it works around",
        ),
    },
    "Update rule": {
        "optimizer": Flag(
            default="adamw", help="update rule", choices=("adamw", "adam", "sgd", "adadelta")
        ),
        "lr": Flag(default=1e-5, help="peak learning rate"),
        "wd": Flag(default=0.1, help="weight decay of adamw"),
        "lr_scheduler": Flag(
            default="constant",
            help="linear and cosine warm up over 10% of the steps",
            choices=("constant", "linear", "cosine"),
        ),
        "apply_gradient_clipping": Flag(default=False, help="clip the gradient's norm"),
        "grad_norm": Flag(default=0.3, help="at this norm"),
    },
    "Devices and memory": {
        "world_size": Flag(default=-1, help="number of GPUs; -1: all"),
        "sharding_strategy": Flag(
            default="full_shard",
            help="full_shard, shard_grad_op and hybrid_full_shard shard with FSDP, ddp copies",
            choices=(
                "full_shard",
                "shard_grad_op",
                "ddp",
                "hybrid_full_shard",
                "hybrid_shard_grad_op",
            ),
            fixed=("full_shard", "shard_grad_op", "ddp", "hybrid_full_shard"),
            why="no hybrid that keeps weights between forward and backward: hybrid_full_shard",
        ),
        "use_cpu_offload": Flag(
            default=True,
            help="accepted either way: shards stay on the GPUs; for a base in host memory use "
            "nibble train with place.kind=stream",
        ),
        "use_activation_cpu_offload": Flag(
            default=False, help="what checkpointed blocks keep waits in host memory"
        ),
        "low_memory": Flag(
            default=True,
            help="load piece by piece",
            fixed=(True,),
            why="nibble always loads one tensor at a time",
        ),
        "no_sync": Flag(
            default=False,
            help="skip gradient sync",
            fixed=(False,),
            why="gradients travel once an update already where memory allows",
        ),
        "loading_workers": Flag(
            default=-1,
            help="threads that quantise",
            fixed=(-1,),
            why="weights are quantised one at a time as they arrive",
        ),
        "master_addr": Flag(
            default="localhost", help="rendezvous", fixed=("localhost",), why=_MACHINES
        ),
        "master_port": Flag(default="12355", help="rendezvous", fixed=("12355",), why=_MACHINES),
    },
    "Output": {
        "output_dir": Flag(default="output", help="the run folder"),
        "save_model": Flag(default=False, help="accepted either way: a run always ends in a save"),
        "log_to": Flag(
            default="tqdm", help="where progress goes", choices=("tqdm", "wandb", "stdout")
        ),
        "project_name": Flag(default="fsdp_qlora", help="wandb project"),
        "name": Flag(default=None, help="wandb run name"),
        "group": Flag(
            default=None, help="wandb group", fixed=(None,), why="set WANDB_RUN_GROUP for it"
        ),
        "entity": Flag(
            default=None, help="wandb entity", fixed=(None,), why="set WANDB_ENTITY for it"
        ),
        "verbose": Flag(
            default=False,
            help="more output",
            fixed=(False,),
            why="metrics.jsonl has every step and the run folder the whole recipe",
        ),
    },
    "Profiling": {
        "profile": Flag(default=False, help="trace a few steps with torch.profiler"),
        "profile_memory": Flag(default=False, help="record the memory of the first step"),
        "export_memory_timeline": Flag(default=False, help="memory timeline beside the trace"),
        "wait_steps": Flag(default=0, help="passes before the profiler warms up (with repeat)"),
        "warmup_steps": Flag(default=1, help="passes of its warm-up"),
        "active_steps": Flag(default=2, help="passes it traces"),
        "profiling_frequency": Flag(default=10, help="traces end at this pass (without repeat)"),
        "repeat": Flag(default=0, help="traces", fixed=(0, 1), why="nibble profiles once in a run"),
        "profiling_output": Flag(
            default="profiles", help="where traces go", fixed=("profiles",), why=_WRITTEN
        ),
        "with_stack": Flag(default=False, help="stacks", fixed=(False,), why=_WRITTEN),
        "with_shapes": Flag(default=False, help="shapes", fixed=(False,), why=_WRITTEN),
        "export_trace": Flag(default=True, help="write the trace", fixed=(True,), why=_WRITTEN),
    },
}
FLAGS: Mapping[str, Flag] = {
    name: flag for group in GROUPS.values() for name, flag in group.items()
}
_TRUE, _FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")


def parse(argv: Sequence[str]) -> dict[str, Value]:
    """Every flag's value: given as `--flag value` or `--flag=value`, else its default.

    A boolean flag alone is true. Raises ConfigError for an unknown flag, a missing or malformed
    value, a value that is not among the choices, and a fixed flag at another value.
    """
    values: dict[str, Value] = {name: flag.default for name, flag in FLAGS.items()}
    rest = list(argv)
    while rest:
        item = rest.pop(0)
        name, equals, text = item.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not item.startswith("--") or name not in FLAGS:
            near = nearest(name, list(FLAGS))
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise ConfigError(f"{item} is not a flag of train.py: {hint}")
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif isinstance(FLAGS[name].default, bool):
                text = "true"
            else:
                raise ConfigError(f"--{name} needs a value: {FLAGS[name].help}")
        values[name] = _value(name, text)
    return values


def _value(name: str, text: str) -> Value:
    flag = FLAGS[name]
    value: Value = text
    try:
        if isinstance(flag.default, bool):
            value = text.lower() in _TRUE
            if not value and text.lower() not in _FALSE:
                raise ValueError
        elif isinstance(flag.default, int | float):
            value = type(flag.default)(text)
    except ValueError:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ConfigError(f"--{name} {text} is not {kind[type(flag.default)]}") from None
    if flag.choices and text not in flag.choices:
        near = nearest(text, flag.choices, limit=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"--{name} {text} is not one of {', '.join(flag.choices)}{hint}")
    if flag.fixed is not None and value not in flag.fixed:
        raise ConfigError(f"--{name} {text} is refused: {flag.why}; leave it out")
    return value


def help_text() -> str:
    """All flags by group, with choices and defaults."""
    lines = [
        "usage: python train.py [--flag value ...]",
        "",
        "The fsdp_qlora training script's command line, run by nibble.",
        "`nibble train` does the same from a recipe, with more settings.",
    ]
    for group, flags in GROUPS.items():
        lines += ["", f"{group}:"]
        for name, flag in flags.items():
            kind = "{" + ",".join(flag.choices) + "}" if flag.choices else _type_name(flag.default)
            lines.append(f"  --{name} {kind}")
            fixed = f"; only {show(flag.default)}: {flag.why}" if flag.fixed is not None else ""
            lines.append(f"      {flag.help} (default {show(flag.default)}{fixed})")
    return "\n".join(lines) + "\n"


def _type_name(value: Value) -> str:
    names = {bool: "true|false", int: "N", float: "X"}
    return names.get(type(value), "TEXT")
