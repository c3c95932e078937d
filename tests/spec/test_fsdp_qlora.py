"""The fsdp_qlora command line means here what it means there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nibble.errors import ConfigError
from nibble.spec import datasets
from nibble.spec.config import Recipe, Source
from nibble.spec.fsdp_flags import FLAGS, help_text, parse
from nibble.spec.fsdp_qlora import PRECISIONS, SINKS, TARGETS, TRAIN_TYPES, translate
from nibble.spec.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def train(command: str) -> Recipe:
    return load_recipe(None, base=translate(command.split()))


def refusal(command: str) -> str:
    with pytest.raises(ConfigError) as error:
        train(command)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_readmes_command() -> None:
    recipe = train(
        "--train_type qlora --dataset alpaca --batch_size 8 --gradient_accumulation_steps 2 "
        "--output_dir qlora_output --log_to wandb"
    )
    assert (recipe.quant.format, recipe.adapter.kind) == ("nf4", "lora")
    assert recipe.data.train == (Source(path="yahma/alpaca-cleaned", format="alpaca"),)
    assert (recipe.train.micro_batch_size, recipe.train.gradient_accumulation_steps) == (8, 2)
    assert recipe.output_dir == "qlora_output"
    assert recipe.report.sinks == ("progress", "wandb")
    assert recipe.report.project == "fsdp_qlora"


def test_the_scripts_defaults() -> None:
    recipe = train("")
    assert recipe.model.path == "meta-llama/Llama-2-7b-hf"
    (source,) = recipe.data.train
    assert (source.path, source.num_rows) == ("yahma/alpaca-cleaned", 512)
    assert (recipe.data.max_length, recipe.train.seed, recipe.train.epochs) == (512, 42, 1.0)
    adapter, optim = recipe.adapter, recipe.optim
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (64, 16.0, 0.1)
    assert adapter.targets == ("all-linear",)
    assert (optim.name, optim.learning_rate, optim.weight_decay) == ("adamw", 1e-5, 0.1)
    assert (optim.betas, optim.eps) == ((0.9, 0.95), 1e-5)
    assert (optim.schedule, optim.max_grad_norm) == ("constant", None)
    assert (optim.warmup_steps, optim.warmup_ratio) == (None, None)
    assert (recipe.train.precision, recipe.train.activation_checkpointing) == ("bf16", "full")
    assert (recipe.report.sinks, recipe.output_dir) == (("progress",), "output")


TYPES = {
    "full": ("none", "none"),
    "lora": ("none", "lora"),
    "custom_lora": ("none", "lora"),
    "qlora": ("nf4", "lora"),
    "custom_qlora": ("nf4", "lora"),
    "hqq_lora": ("hqq", "lora"),
    "bnb_dora": ("nf4", "dora"),
    "hqq_dora": ("hqq", "dora"),
    "bnb_llama_pro": ("nf4", "expand"),
    "hqq_llama_pro": ("hqq", "expand"),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dataset", datasets.NAMED)
def test_every_train_type_on_every_data_set(name: str, dataset: str) -> None:
    recipe = train(f"--train_type {name} --dataset {dataset}")
    assert (recipe.quant.format, recipe.adapter.kind) == TYPES[name]
    assert recipe.quant.bits == (4 if "hqq" in name else None)


def test_the_tables_cover_every_choice() -> None:
    assert set(TRAIN_TYPES) == set(TYPES) == set(FLAGS["train_type"].choices)
    assert set(datasets.NAMED) == set(FLAGS["dataset"].choices)
    assert set(PRECISIONS) == set(FLAGS["precision"].choices)
    assert set(SINKS) == set(FLAGS["log_to"].choices)
    assert set(TARGETS) == set(FLAGS["lora_target_modules"].choices)
    assert len(FLAGS) == 54  # as in the script's last version


def test_named_data_sets() -> None:
    for name in datasets.NAMED:
        (source,) = datasets.sources(name)
        Source.model_validate(source)
    assert datasets.sources("dummy", num_rows=7) == [{"path": "builtin:dummy", "num_rows": 7}]
    assert datasets.sources("orca_math")[0]["num_rows"] == 512
    assert "num_rows" not in datasets.sources("alpaca")[0]
    with pytest.raises(ConfigError, match="one of alpaca, alpaca_sample"):
        datasets.sources("alpacca")
    sql = train("--dataset sql")
    assert (sql.data.train[0].split, sql.data.eval_rows) == ("validation", 1000)


@pytest.mark.parametrize(
    "command, path, expected",
    [
        ("--dataset dummy --dataset_samples 9", "data.train.0.num_rows", 9),
        ("--apply_gradient_clipping true", "optim.max_grad_norm", 0.3),
        ("--apply_gradient_clipping --grad_norm 1.0", "optim.max_grad_norm", 1.0),
        ("--lr_scheduler linear", "optim.warmup_ratio", 0.1),
        ("--lr_scheduler cosine", "optim.floor_ratio", 0.1),
        ("--optimizer adam", "optim.weight_decay", 0.0),
        ("--optimizer adam", "optim.betas", (0.9, 0.999)),
        ("--optimizer sgd", "optim.name", "sgd"),
        ("--precision fp16_autocast", "train.precision", "fp16"),
        ("--precision bf16_autocast", "train.adapter_precision", "fp32"),
        ("--use_gradient_checkpointing false", "train.activation_checkpointing", "none"),
        ("--reentrant_checkpointing true", "train.activation_checkpointing", "full"),
        ("--use_cpu_offload false", "place.kind", "fsdp"),
        ("--world_size 1", "place.kind", "single"),
        ("--world_size 2", "place.num_devices", 2),
        ("--sharding_strategy shard_grad_op", "place.shard", "grad-op"),
        ("--sharding_strategy hybrid_full_shard", "place.shard", "hybrid"),
        ("--sharding_strategy ddp", "place.kind", "ddp"),
        ("--use_activation_cpu_offload true", "train.activation_offload", True),
        ("--save_model true --world_size 1", "output_dir", "output"),
        ("--train_type hqq_lora --n_bits 2", "quant.bits", 2),
        ("--lora_target_modules default", "adapter.targets", ("q_proj", "v_proj")),
        ("--max_steps 10 --gradient_accumulation_steps 4", "train.max_steps", 2),
        ("--log_to stdout", "report.sinks", ("plain",)),
        ("--log_to wandb --name a", "report.run_name", "a"),
        ("--lr=1e-3", "optim.learning_rate", 1e-3),
        ("--context-length 64", "data.max_length", 64),
        (
            "--train_type bnb_llama_pro --llama_pro_path m/llama_blk_exp-32-35",
            "adapter.num_new_blocks",
            3,
        ),
        ("--profile true", "train.profile.start_step", 9),
        ("--profile true --repeat 1 --wait_steps 3", "train.profile.start_step", 5),
        ("--profile_memory true", "train.profile.start_step", 1),
    ],
)
def test_a_flag_sets_what_it_means(command: str, path: str, expected: object) -> None:
    value: Any = train(command)
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    assert value == expected


@pytest.mark.parametrize(
    "command, parts",
    [
        ("--train_type foo", ["--train_type foo", "custom_qlora", "hqq_llama_pro"]),
        ("--train_type qlra", ["did you mean qlora?"]),
        ("--dataset c4", ["--dataset c4", "orca_math"]),
        ("--batch_sise 3", ["--batch_sise is not a flag", "did you mean --batch_size?"]),
        ("stray", ["stray is not a flag"]),
        ("--lr", ["--lr needs a value"]),
        ("--lr fast", ["--lr fast is not a number"]),
        ("--batch_size 1.5", ["--batch_size 1.5 is not a whole number"]),
        ("--save_model perhaps", ["--save_model perhaps is not true or false"]),
        ("--world_size 0", ["--world_size 0", "-1 for all"]),
        (
            "--sharding_strategy hybrid_shard_grad_op",
            ["--sharding_strategy hybrid_shard_grad_op is refused", "hybrid_full_shard"],
        ),
        (
            "--use_activation_cpu_offload true --use_gradient_checkpointing false",
            ["train.activation_offload"],
        ),
        ("--low_memory false", ["--low_memory false", "one tensor at a time"]),
        ("--entity me", ["WANDB_ENTITY"]),
        ("--optimizer adadelta", ["--optimizer adadelta is not supported"]),
        ("--n_bits 2", ["--n_bits 2 has no effect", "hqq"]),
        ("--train_type full --lora_rank 8", ["--lora_rank 8 has no effect"]),
        ("--grad_norm 1", ["--grad_norm 1.0 has no effect", "--apply_gradient_clipping"]),
        ("--optimizer sgd --wd 0.5", ["--wd 0.5 has no effect"]),
        ("--dataset alpaca --dataset_samples 9", ["--dataset_samples 9 has no effect"]),
        ("--project_name p", ["--project_name p has no effect", "--log_to wandb"]),
        ("--active_steps 5", ["--active_steps 5 has no effect", "--profile true"]),
        ("--llama_pro_path a_blk_exp-2-4", ["--llama_pro_path", "llama_pro train type"]),
        ("--train_type bnb_llama_pro --llama_pro_path a", ["blk_exp-OLD-NEW"]),
        ("--train_type bnb_llama_pro --llama_pro_path blk_exp-4-4", ["no new layers"]),
        ("--max_steps 1 --gradient_accumulation_steps 4", ["less than one update"]),
        ("--max_steps 8 --num_epochs 2", ["within each epoch"]),
        ("--train_type full --precision bf16_autocast", ["bf16_autocast", "fp32"]),
        ("--batch_size 0", ["train.micro_batch_size=0 must be >= 1"]),
    ],
)
def test_what_is_refused(command: str, parts: list[str]) -> None:
    message = refusal(command)
    assert all(part in message for part in parts), message


def test_every_default_may_be_written_out() -> None:
    written = [
        f"--{name}={flag.default!s}" for name, flag in FLAGS.items() if flag.default is not None
    ]
    assert load_recipe(None, base=translate(written)) == train("")
    assert parse(written) == {name: flag.default for name, flag in FLAGS.items()}


def test_help_names_every_flag_once() -> None:
    text = help_text()
    assert all(text.count(f"  --{name} ") == 1 for name in FLAGS)


def script(*args: str) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "train.py", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done, time.perf_counter() - start


def test_the_script_answers_a_usage_error_at_once() -> None:
    done, seconds = script("--train_type", "foo")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1
    assert lines[0].startswith("train.py: --train_type foo is not one of full, lora")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "pydantic", "transformers", "yaml", "numpy"}
    assert seconds < 2.0  # 0.05 s on an idle machine; other tests run beside this one


def test_the_script_prints_its_help() -> None:
    done, _ = script("--help")
    assert done.returncode == 0 and done.stdout == help_text()
