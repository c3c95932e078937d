"""Words of other trainers mean here what they mean there, or are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nibble.errors import ConfigError
from nibble.spec import schema
from nibble.spec.aliases import ALIASES, VALUES
from nibble.spec.config import Recipe
from nibble.spec.load import load_recipe
from nibble.spec.refusals import REFUSED, refusal
from nibble.spec.words import SOURCES, look_up


def load(words: dict[str, Any]) -> Recipe:
    return load_recipe(None, base={"model": "m", **words})


def settings(words: dict[str, Any]) -> dict[str, Any]:
    return load(words).model_dump(exclude_unset=True, mode="json")


def refused(words: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        load(words)
    assert "\n" not in str(error.value)
    return str(error.value)


LORA = {"adapter.kind": "lora"}
NF4 = {"adapter.kind": "lora", "quant.format": "nf4"}

# words -> what they must set, by dotted path
CROSSWALK: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # axolotl
    ({"adapter": "qlora"}, NF4),
    ({"adapter": "qlora", "load_in_4bit": True, "load_in_8bit": False}, NF4),
    ({"adapter": "lora", "load_in_8bit": True}, {**LORA, "quant.format": "int8"}),
    ({"adapter": "qlora", "bnb_4bit_quant_type": "fp4"}, {**LORA, "quant.format": "fp4"}),
    ({"adapter": "lora", "lora_target_linear": True}, {**LORA, "adapter.targets": ["all-linear"]}),
    (
        {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
         "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"]},
        {"adapter.rank": 8, "adapter.alpha": 16, "adapter.dropout": 0.05,
         "adapter.targets": ["q_proj"], "adapter.modules_to_save": ["lm_head"]},
    ),
    ({"adapter": "lora", "peft_use_dora": True}, {"adapter.kind": "dora"}),
    ({"adapter": "lora", "peft_use_rslora": True}, {"adapter.rank_stabilised": True}),
    ({"use_liger_kernel": False}, {"train.fused_kernels": False}),
    ({"sequence_len": 64}, {"data.max_length": 64}),
    ({"sample_packing": True, "eval_sample_packing": True}, {"data.packing": True}),
    ({"train_on_inputs": True}, {"data.loss_on": "all"}),
    ({"train_on_inputs": False}, {"data.loss_on": "answers"}),
    ({"num_epochs": 3}, {"train.epochs": 3}),
    ({"optimizer": "adamw_bnb_8bit"}, {"optim.name": "adamw8bit"}),
    ({"optimizer": "paged_adamw_32bit"}, {"optim.name": "adamw"}),
    ({"cosine_min_lr_ratio": 0.1}, {"optim.floor_ratio": 0.1}),
    ({"bf16": "auto", "fp16": None, "tf32": False}, {"train.precision": "bf16"}),
    ({"gradient_checkpointing": False}, {"train.activation_checkpointing": "none"}),
    ({"val_set_size": 20}, {"data.eval_rows": 20}),
    ({"wandb_project": "p", "wandb_name": "n"},
     {"report.project": "p", "report.run_name": "n", "report.sinks": ["progress", "wandb"]}),
    ({"gpu_memory_limit": 20}, {"place.vram": "20GiB"}),
    ({"dataset_prepared_path": "c", "deepspeed": None, "fsdp": [], "special_tokens": None},
     {"data.cache_dir": "c"}),
    # LLaMA-Factory
    ({"finetuning_type": "lora", "quantization_bit": 4, "stage": "sft", "do_train": True}, NF4),
    ({"finetuning_type": "lora", "quantization_bit": 8}, {**LORA, "quant.format": "int8"}),
    ({"finetuning_type": "lora", "quantization_bit": 3, "quantization_method": "hqq"},
     {"quant.format": "hqq", "quant.bits": 3}),
    ({"finetuning_type": "lora", "lora_target": "all"}, {"adapter.targets": ["all-linear"]}),
    ({"finetuning_type": "lora", "lora_target": "q_proj,v_proj", "additional_target": "lm_head"},
     {"adapter.targets": ["q_proj", "v_proj"], "adapter.modules_to_save": ["lm_head"]}),
    ({"finetuning_type": "full", "quantization_bit": None}, {"adapter.kind": "none"}),
    ({"cutoff_len": 64, "neat_packing": True, "packing": True},
     {"data.max_length": 64, "data.packing": True}),
    ({"train_on_prompt": True}, {"data.loss_on": "all"}),
    ({"disable_gradient_checkpointing": True}, {"train.activation_checkpointing": "none"}),
    ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
     {"train.epochs": 2, "train.micro_batch_size": 4}),
    ({"val_size": 9, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 6},
     {"data.eval_rows": 9, "train.eval_every": 5, "train.save_every": 6}),
    ({"finetuning_type": "lora", "use_dora": True, "use_rslora": True},
     {"adapter.kind": "dora", "adapter.rank_stabilised": True}),
    ({"flash_attn": None, "report_to": "none"}, {"report.sinks": ["progress"]}),
    # TRL and transformers
    ({"use_peft": True, "load_in_4bit": True, "use_bnb_nested_quant": True},
     {**NF4, "quant.double_quant": True}),
    ({"max_length": 64, "completion_only_loss": True},
     {"data.max_length": 64, "data.loss_on": "answers"}),
    ({"assistant_only_loss": False}, {"data.loss_on": "all"}),
    ({"optim": "adamw_torch_fused", "lr_scheduler_type": "constant_with_warmup"},
     {"optim.name": "adamw", "optim.schedule": "constant"}),
    ({"optim": "adamw_8bit"}, {"optim.name": "adamw8bit"}),
    ({"optim": "adafactor"}, {"optim.name": "adafactor"}),
    ({"optim": "sgd"}, {"optim.name": "sgd"}),
    ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["attn", "mlp"],
      "optim_args": "rank=64, update_proj_gap=100, scale=0.10, proj_type=std"},
     {"optim.name": "adamw", "optim.method": "galore", "optim.layerwise": True,
      "optim.targets": ["attn", "mlp"], "optim.rank": 64, "optim.refresh_every": 100,
      "optim.scale": 0.1, "optim.side": "std"}),
    ({"optim": "galore_adamw_8bit", "optim_args": {"rank": 64, "scale": 0.1}},
     {"optim.method": "galore", "optim.state": "8bit", "optim.rank": 64, "optim.scale": 0.1}),
    ({"optim": "galore_adafactor", "optim_target_modules": "all-linear"},
     {"optim.name": "adafactor", "optim.method": "galore", "optim.targets": ["all-linear"]}),
    ({"optim": "apollo_adamw",
      "optim_args": "proj=random,rank=1,scale=128.0,scale_type=tensor,update_proj_gap=200"},
     {"optim.method": "apollo", "optim.rank": 1, "optim.residual": "tensor",
      "optim.basis": "seeded", "optim.scale": 128**0.5}),
    ({"use_galore": True, "galore_rank": 16, "galore_update_interval": 50, "galore_scale": 2.0,
      "galore_target": "q_proj,v_proj", "galore_layerwise": True, "finetuning_type": "full"},
     {"optim.method": "galore", "optim.rank": 16, "optim.refresh_every": 50, "optim.scale": 2.0,
      "optim.targets": ["q_proj", "v_proj"], "optim.layerwise": True}),
    ({"use_apollo": True, "apollo_rank": 8, "apollo_scale": 4.0, "apollo_scale_type": "channel",
      "apollo_proj": "random", "apollo_target": "all"},
     {"optim.method": "apollo", "optim.rank": 8, "optim.scale": 2.0, "optim.residual": "channel",
      "optim.targets": ["all-linear"]}),
    ({"use_galore": False}, {}),
    ({"model": None, "model_config": "configs/llama_60m.json", "num_training_steps": 9,
      "optimizer": "galore_adamw8bit_per_layer"},
     {"model.path": "builtin:llama-60m", "model.from_scratch": True, "train.max_steps": 9,
      "optim.state": "8bit", "optim.method": "galore", "optim.layerwise": True}),
    ({"pretraining_dataset": [{"path": "allenai/c4", "name": "en", "text_column": "body"}],
      "max_steps": 5}, {"data.streaming": True}),
    ({"optim.method": "galore", "rank": 8, "targets": "mlp"},
     {"optim.rank": 8, "optim.targets": ["mlp"]}),
    ({"adapter": "lora", "rank": 8}, {"adapter.rank": 8}),
    ({"adam_beta2": 0.95, "adam_epsilon": 1e-6},
     {"optim.betas": [0.9, 0.95], "optim.eps": 1e-6}),
    ({"warmup_steps": 0.1}, {"optim.warmup_ratio": 0.1}),
    ({"warmup_steps": 7}, {"optim.warmup_steps": 7}),
    ({"max_grad_norm": 0}, {"optim.max_grad_norm": None}),
    ({"max_steps": -1, "save_total_limit": 3},
     {"train.max_steps": None, "train.keep_checkpoints": 3}),
    ({"fp16": True, "bf16": False}, {"train.precision": "fp16"}),
    ({"torch_dtype": "bfloat16"}, {"train.precision": "bf16"}),
    ({"report_to": ["wandb", "tensorboard"]},
     {"report.sinks": ["progress", "wandb", "tensorboard"]}),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": False}, "logging_steps": 5},
     {"train.log_every": 5}),
    ({"dataset_name": "hub/x", "dataset_config": "en", "dataset_train_split": "s"},
     {"data.train": [{"path": "hub/x", "name": "en", "split": "s"}]}),
    # unsloth
    ({"use_peft": True, "r": 8, "target_modules": ["q_proj"], "max_seq_length": 64, "bias": "none"},
     {"adapter.rank": 8, "adapter.targets": ["q_proj"], "data.max_length": 64}),
    (
        {"use_gradient_checkpointing": "unsloth"},
        {"train.activation_checkpointing": "full", "train.activation_offload": True},
    ),
    ({"activation_offloading": True}, {"train.activation_offload": True}),
    ({"enable_activation_offloading": True}, {"train.activation_offload": True}),
    ({"train_on_responses_only": True}, {"data.loss_on": "answers"}),
    # torchtune
    ({"model": {"path": "m", "lora_rank": 8, "lora_alpha": 16,
                "lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True},
      "adapter": "lora"},
     {"adapter.rank": 8, "adapter.targets":
      ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}),
    ({"model": {"_component_": "torchtune.models.llama3_1.qlora_llama3_1_8b"},
      "checkpointer": {"checkpoint_dir": "d"}}, {**NF4, "model.path": "d"}),
    ({"tokenizer": {"path": "t", "max_seq_len": 64}, "batch_size": 2},
     {"model.tokenizer": "t", "data.max_length": 64, "train.micro_batch_size": 2}),
    ({"optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 1e-5}},
     {"optim.name": "adamw8bit", "optim.learning_rate": 1e-5}),
    ({"lr_scheduler": {"_component_":
      "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 5}},
     {"optim.schedule": "cosine", "optim.warmup_steps": 5}),
    ({"dataset": {"source": "d.json", "packed": True, "train_on_input": True}},
     {"data.train": [{"path": "d.json"}], "data.packing": True, "data.loss_on": "all"}),
    ({"enable_activation_checkpointing": True, "clip_grad_norm": 0.5, "dtype": "fp32"},
     {"train.activation_checkpointing": "full", "optim.max_grad_norm": 0.5,
      "train.precision": "fp32"}),
    # litgpt
    ({"quantize": "bnb.nf4", "adapter": "lora"}, {**NF4, "quant.double_quant": False}),
    ({"train": {"global_batch_size": 16, "micro_batch_size": 4, "max_seq_length": 64}},
     {"train.micro_batch_size": 4, "train.gradient_accumulation_steps": 4,
      "data.max_length": 64}),
    ({"adapter": "lora", "lora_query": True, "lora_key": False, "lora_mlp": True},
     {"adapter.targets": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    ({"data": {"mask_prompt": True, "json_path": "f.json"}, "precision": "bf16-true"},
     {"data.loss_on": "answers", "data.train": [{"path": "f.json"}], "train.precision": "bf16"}),
    ({"train": {"min_lr": 1e-5}, "learning_rate": 1e-4}, {"optim.floor_ratio": 0.1}),
    ({"out_dir": "o", "eval": {"interval": 4}, "data": {"eval_rows": 3}},
     {"output_dir": "o", "train.eval_every": 4}),
    # Automodel
    ({"step_scheduler": {"local_batch_size": 2, "global_batch_size": 8}},
     {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 4}),
    ({"peft": {"dim": 8, "alpha": 16, "match_all_linear": True}, "adapter": "lora"},
     {"adapter.rank": 8, "adapter.alpha": 16, "adapter.targets": ["all-linear"]}),
    # mlx-lm
    ({"train": True, "data": "d", "fine_tune_type": "dora",
      "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0}},
     {"data.train": [{"path": "d"}], "adapter.kind": "dora", "adapter.alpha": 16.0}),
    ({"iters": 60, "grad_accumulation_steps": 4, "grad_checkpoint": True, "steps_per_report": 2},
     {"train.max_steps": 15, "train.gradient_accumulation_steps": 4,
      "train.activation_checkpointing": "full", "train.log_every": 2}),
    ({"adapter_path": "a", "mask_prompt": True}, {"output_dir": "a", "data.loss_on": "answers"}),
    # swift
    ({"tuner_type": "lora", "quant_method": "bnb", "quant_bits": 4, "target_modules": "all-linear"},
     {**NF4, "adapter.targets": ["all-linear"]}),
    ({"dataset": ["d.jsonl#500"], "truncation_strategy": "delete", "loss_scale": "all"},
     {"data.train": [{"path": "d.jsonl", "num_rows": 500}], "data.too_long": "drop",
      "data.loss_on": "all"}),
    ({"split_dataset_ratio": 0, "data_seed": 0}, {}),
    # fsdp_qlora
    ({"dataset": "alpaca", "lr": 1e-5, "wd": 0.1, "context_length": 64},
     {"data.train": [{"path": "yahma/alpaca-cleaned", "format": "alpaca"}],
      "optim.learning_rate": 1e-5, "optim.weight_decay": 0.1, "data.max_length": 64}),
]  # fmt: skip


@pytest.mark.parametrize("words, expected", CROSSWALK, ids=lambda v: "-".join(v)[:60])
def test_crosswalk(words: dict[str, Any], expected: dict[str, Any]) -> None:
    found = settings(words)
    assert {path: look_up(found, path) for path in expected} == expected


AXOLOTL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"path": "p", "type": "alpaca"}, {"path": "p", "format": "alpaca"}),
    ({"path": "p", "type": "sharegpt", "split": "s"},
     {"path": "p", "format": "sharegpt", "split": "s"}),
    ({"path": "p", "type": "chat_template", "field_messages": "turns"},
     {"path": "p", "format": "messages", "columns": {"messages": "turns"}}),
    ({"path": "p", "type": "chat_template", "field_messages": "c", "message_property_mappings":
      {"role": "from", "content": "value"}, "roles_to_train": ["assistant"]},
     {"path": "p", "format": "sharegpt", "columns": {"conversations": "c"}}),
    ({"path": "json", "data_files": "x.jsonl", "ds_type": "json", "type": "completion",
      "field": "body"}, {"path": "x.jsonl", "format": "text", "columns": {"text": "body"}}),
    ({"path": "p", "type":
      {"field_instruction": "q", "field_output": "a", "format": "Q {instruction}"}},
     {"path": "p", "format": "alpaca", "columns": {"instruction": "q", "output": "a"},
      "template": "Q {q}"}),
    ({"path": "p", "type": None, "name": "en"}, {"path": "p", "name": "en"}),
]  # fmt: skip


@pytest.mark.parametrize("entry, source", AXOLOTL)
def test_axolotl_datasets(entry: dict[str, Any], source: dict[str, Any]) -> None:
    assert settings({"datasets": [entry]})["data"]["train"] == [source]
    assert settings({"test_datasets": [entry]})["data"]["eval"] == [source]


def test_a_text_source_needs_no_answers() -> None:
    words = {"datasets": [{"path": "p", "type": "completion"}]}
    assert load(words).data.train[0].format == "text"


@pytest.mark.parametrize(
    "words, parts",
    [
        ({"adapter": "lora", "load_in_4bit": True, "load_in_8bit": True},
         ["load_in_4bit=true", "load_in_8bit=true", "quant.format"]),
        ({"adapter": {"kind": "lora", "rank": 8}, "lora_r": 16},
         ["adapter.rank=8", "lora_r=16"]),
        ({"sequence_len": 1024, "max_length": 512}, ["sequence_len=1024", "max_length=512"]),
        ({"adapter": "qlora", "load_in_4bit": False}, ["adapter=qlora", "load_in_4bit=false"]),
        ({"bf16": True, "fp16": True}, ["bf16=true", "fp16=true", "train.precision"]),
        ({"train_on_inputs": True, "mask_prompt": True}, ["train_on_inputs", "mask_prompt"]),
        ({"per_device_eval_batch_size": 8}, ["per_device_eval_batch_size=8",
                                              "train.micro_batch_size=1", "decides"]),
        ({"sample_packing": True, "eval_sample_packing": False}, ["eval_sample_packing=false"]),
        ({"adapter": "lora", "lora_target": "q_proj", "lora_mlp": True},
         ["lora_target=q_proj", "lora_mlp=true"]),
        ({"use_peft": False, "adapter": "lora"}, ["use_peft=false", "adapter=lora"]),
        ({"iters": 10, "gradient_accumulation_steps": 4}, ["iters", "not a multiple of"]),
        ({"global_batch_size": 10, "micro_batch_size": 4}, ["global_batch_size", "multiple"]),
    ],
)  # fmt: skip
def test_two_words_that_disagree(words: dict[str, Any], parts: list[str]) -> None:
    message = refused(words)
    assert all(part in message for part in parts), message


def test_two_words_that_agree_are_fine() -> None:
    words = {"adapter": "lora", "lora_r": 8, "lora_rank": 8, "peft": {"dim": 8}}
    assert load(words).adapter.rank == 8


@pytest.mark.parametrize(
    "words, parts",
    [
        ({"fsdp": ["full_shard"]}, ["fsdp", "place.kind"]),
        ({"fsdp_config": {"fsdp_version": 2}}, ["fsdp_config", "place.kind"]),
        ({"deepspeed": "z3.json"}, ["deepspeed", "place.kind"]),
        ({"use_badam": True}, ["use_badam", "optim.method=galore"]),
        ({"galore_with_embedding": True}, ["galore_with_embedding", "optim.method"]),
        ({"optim": "galore_adamw", "optim_args": "rank"}, ["optim_args", "key=value"]),
        ({"optim": "galore_adamw", "optim_args": "beta3=1"}, ["beta3=1", "update_proj_gap"]),
        ({"optim": "apollo_adamw_layerwise"}, ["optim.layerwise", "optim.residual=channel"]),
        ({"dpo_beta": 0.1}, ["dpo_beta", "preference"]),
        ({"rl": "dpo"}, ["rl", "preference"]),
        ({"stage": "dpo"}, ["stage", "sft"]),
        ({"finetuning_type": "freeze"}, ["finetuning_type", "freeze"]),
        ({"optimizer": "galore_lion"}, ["optim.name=galore_lion", "adamw8bit"]),
        ({"lr_scheduler_type": "polynomial"}, ["optim.schedule=polynomial", "cosine"]),
        ({"val_set_size": 0.05}, ["val_set_size", "data.eval_rows", "500 of 10,000"]),
        ({"eval_steps": 0.1}, ["eval_steps", "train.eval_every"]),
        ({"eval_strategy": "epoch"}, ["eval_strategy", "train.eval_every"]),
        ({"template": "llama3"}, ["template", "data.chat_template"]),
        ({"chat_template": "chatml"}, ["chatml is a name", "Jinja"]),
        ({"flash_attention": True}, ["flash_attention", "kernels itself"]),
        ({"resume_from_checkpoint": "x"}, ["nibble train --resume"]),
        ({"report_to": "swanlab"}, ["swanlab"]),
        ({"quantization_bit": 5}, ["quantization_bit", "hqq"]),
        ({"bf16": False}, ["bf16", "train.precision"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights"]),
        ({"datasets": [{"path": "p", "type": "pygmalion"}]}, ["pygmalion", "alpaca, sharegpt"]),
        ({"datasets": [{"path": "p", "shards": 4}]}, ["shards of p", "not supported yet"]),
        ({"model": {"_component_": "torchtune.models.x.lora_x"}}, ["model.path"]),
    ],
)  # fmt: skip
def test_features_that_are_not_there(words: dict[str, Any], parts: list[str]) -> None:
    message = refused(words)
    assert all(part in message for part in parts), message
    assert "unknown key" not in message


def test_all_refused_words_are_named_at_once() -> None:
    message = refused({"deepspeed": "a", "flash_attention": True, "plot_loss": True})
    assert message.count("; ") == 2


def test_asking_for_nothing_is_accepted() -> None:
    nothing = [word for word in REFUSED if "*" not in word]
    assert load(dict.fromkeys(nothing)) == load({})
    assert load({"deepspeed": "", "streaming": False, "fsdp": []}) == load({})


def test_every_alias_leads_to_a_setting() -> None:
    for word, meaning in ALIASES.items():
        if isinstance(meaning, str):
            head, _, leaf = meaning.rpartition(".")
            known = meaning in schema.fields() or (
                head in SOURCES and leaf in schema.source_fields()
            )
            assert known, f"{word} -> {meaning}"
    assert set(VALUES) <= set(schema.fields())


def test_no_table_hides_a_setting_of_nibbles_own() -> None:
    own = [path for path in schema.fields() if "[]" not in path]
    assert [path for path in own if path in ALIASES] == []
    sections = [*schema.sections(), *own]
    assert [path for path in sections if refusal(path)] == []
    assert [word for word in ALIASES if word in REFUSED] == []


def test_every_refusal_says_what_to_do() -> None:
    for pattern, reason in REFUSED.items():
        assert re.search(r"remove|give|use|not supported|only|set |every|several", reason), pattern


def test_a_real_axolotl_file(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text(
        "base_model: NousResearch/Llama-3.2-1B\n"
        "load_in_8bit: false\nload_in_4bit: true\nstrict: false\n"
        "datasets:\n  - path: teknium/GPT4-LLM-Cleaned\n    type: alpaca\n"
        "val_set_size: 0\noutput_dir: ./out\n"
        "adapter: qlora\nlora_model_dir:\nsequence_len: 2048\nsample_packing: true\n"
        "lora_r: 32\nlora_alpha: 16\nlora_dropout: 0.05\nlora_target_linear: true\n"
        "wandb_project:\nwandb_entity:\ngradient_accumulation_steps: 4\nmicro_batch_size: 2\n"
        "num_epochs: 1\noptimizer: adamw_bnb_8bit\nlr_scheduler: cosine\n"
        "learning_rate: 0.0002\nbf16: auto\ntf32: false\ngradient_checkpointing: true\n"
        "resume_from_checkpoint:\nlogging_steps: 1\nwarmup_ratio: 0.1\nweight_decay: 0.0\n"
        "special_tokens:\n"
    )
    recipe = load_recipe(file, ["learning_rate=1e-5"])
    assert (recipe.quant.format, recipe.adapter.rank, recipe.adapter.alpha) == ("nf4", 32, 16)
    assert (recipe.optim.name, recipe.optim.learning_rate) == ("adamw8bit", 1e-5)
    assert recipe.data.packing and recipe.data.train[0].format == "alpaca"
