"""Words of other trainers whose feature nibble does not have, and what to do about each.

A known word gets an answer instead of "unknown key". Asking for nothing (`deepspeed: null`,
`streaming: false`) is accepted; anything else is refused, because a key without effect would let a
user believe in it. Patterns are shell-style, the first match counts, and a section or setting of
nibble's own is never matched.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_MANY_GPUS = "no counterpart here: give place.kind (ddp, fsdp, stream, deepspeed) and its settings"
_PARALLEL = "this kind of parallelism is not supported yet: place.kind=fsdp or stream"
_LOW_RANK = "no counterpart here: give optim.method and the settings beside it"
_BLOCKWISE = "not supported yet: use optim.method=galore with optim.layerwise, or an adapter"
_PREFERENCE = (
    "preference and reinforcement learning are not supported yet: only fine-tuning on examples"
)
_OFFLOAD = "no counterpart here: use place.kind=stream for frozen weights, train.activation_offload"
_KERNELS = "nibble picks the kernels itself: remove it"
_HUB = "nibble writes local folders only: remove it"
_TRACKER = "this tracker is not supported yet: wandb or tensorboard"
_ENVIRONMENT = "set wandb's environment variable for it (such as WANDB_ENTITY): remove it"
_WORKERS = "data is prepared once and cached, there are no workers to set: remove it"
_NO_ACCESS = "not supported yet: remove it"

REFUSED: dict[str, str] = {
    # Placement
    "fsdp*": _MANY_GPUS,
    "deepspeed*": _MANY_GPUS,
    "ddp*": _MANY_GPUS,
    "tensor_parallel_size": _PARALLEL,
    "context_parallel_size": _PARALLEL,
    "sequence_parallel_*": _PARALLEL,
    "pipeline_parallel_size": _PARALLEL,
    "dp_shard_size": _MANY_GPUS,
    "tensor_parallel_dim": _PARALLEL,
    "data_parallel_*": _MANY_GPUS,
    "world_size": _MANY_GPUS,
    "devices": _MANY_GPUS,
    "num_nodes": _MANY_GPUS,
    "sharding_strategy": _MANY_GPUS,
    "distributed*": _MANY_GPUS,
    "accelerator_config*": _MANY_GPUS,
    "device_map": "nibble places a model by `place`: remove it",
    "max_memory": "give place.vram, such as 24GiB",
    "layer_offloading": _OFFLOAD,
    "use_cpu_offload": _OFFLOAD,
    "offload_*": _OFFLOAD,
    "use_kt": _OFFLOAD,
    # Optimisers
    "galore*": _LOW_RANK,
    "q_galore*": _LOW_RANK,
    "apollo*": _LOW_RANK,
    "use_badam": _BLOCKWISE,
    "badam*": _BLOCKWISE,
    "lisa_*": _BLOCKWISE,
    "optimizer.fused": _KERNELS,
    "optimizer_in_bwd": "low-rank methods have it: give optim.layerwise and optim.in_backward",
    "loraplus_*": "LoRA+ (two learning rates) is not supported yet: remove it",
    "embedding_learning_rate": "one learning rate for all: remove it",
    "lr_groups": "one learning rate for all: remove it",
    "lr_schedule*": "give optim.schedule: constant, linear or cosine",
    "lr_scheduler_kwargs*": "only min_lr and min_lr_rate are known: give optim.floor_ratio",
    # Objectives
    "dpo*": _PREFERENCE,
    "kto*": _PREFERENCE,
    "orpo*": _PREFERENCE,
    "grpo*": _PREFERENCE,
    "simpo*": _PREFERENCE,
    "pref_*": _PREFERENCE,
    "rl": _PREFERENCE,
    "rl_beta": _PREFERENCE,
    "rlhf_type": _PREFERENCE,
    "reward_*": _PREFERENCE,
    "trl*": _PREFERENCE,
    "vllm*": _PREFERENCE,
    "loss_type": "the loss is the cross-entropy: remove it",
    "label_smoothing*": "label smoothing is not supported yet: remove it",
    "neftune_noise_alpha": "NEFTune is not supported yet: remove it",
    "mask_history": "every answer of a conversation is trained: remove it",
    # Adapters and formats
    "use_llama_pro": "give adapter.kind=expand and adapter.num_new_blocks on the unexpanded model",
    "freeze_*": "give adapter.kind=expand for new blocks, or adapter.modules_to_save",
    "unfrozen_parameters": "training parts of the base is not supported yet: use modules_to_save",
    "layers_to_transform": _NO_ACCESS,
    "lora_layers_to_transform": _NO_ACCESS,
    "peft_layers_to_transform": _NO_ACCESS,
    "num_layers": "adapters go on every layer: remove it",
    "apply_lora_to_output": "name lm_head in adapter.targets: remove it",
    "model.apply_lora_to_output": "name lm_head in adapter.targets: remove it",
    "loftq_config": "LoftQ is not supported yet: remove it",
    "pissa_*": "PiSSA is not supported yet: remove it",
    "peft_init_lora_weights": "B starts at zero, A at random: remove it",
    "relora*": "give optim.restart_every and optim.restart_warmup_steps",
    "merge_lora": "use `nibble export RUN --to merged` afterwards: remove it",
    "gptq*": "GPTQ bases are not supported yet: nf4, fp4, int8, hqq or ternary",
    "load_in_fp8": "fp8 is not supported yet: nf4, fp4, int8, hqq or ternary",
    "fp8*": "fp8 is not supported yet: remove it",
    "bnb_4bit_quant_storage": "packed weights are stored as bytes: remove it",
    "bnb_config_kwargs*": "give quant.format, quant.double_quant or quant.int8_threshold",
    "qat*": "quantisation-aware training is not supported yet: remove it",
    # Data
    "dataset_dir": "give the path of each file in data.train",
    "dataset_text_field": "give data.train.columns={text: COLUMN}",
    "dataset_test_split": "give data.eval as a source with its split",
    "dataset._component_": "give data.train.format: alpaca, messages, sharegpt or text",
    "template": "the tokenizer's own template is used; or give a Jinja file as data.chat_template",
    "conversation*": "the tokenizer's own chat template is used: remove it",
    "special_tokens*": "the tokenizer's own special tokens are used: remove it",
    "tokens": "added tokens are not supported yet: remove it",
    "added_tokens_overrides": "added tokens are not supported yet: remove it",
    "resize_vocab": "added tokens are not supported yet: remove it",
    "pad_to_sequence_len": "rows are padded to the longest of their batch: remove it",
    "pad_to_multiple_of": "rows are padded to the longest of their batch: remove it",
    "group_by_length": "rows come in an order that seed and epoch decide: remove it",
    "length_column_name": "rows come in an order that seed and epoch decide: remove it",
    "curriculum_sampling": "rows come in an order that seed and epoch decide: remove it",
    "shuffle_merged_datasets": "give data.shuffle",
    "*num_workers": _WORKERS,
    "*_num_proc": _WORKERS,
    "dataset_processes": _WORKERS,
    "dataloader_*": _WORKERS,
    "overwrite_cache": "the cache is addressed by content and never stale: remove it",
    "remove_unused_columns": "columns that a format does not name are ignored: remove it",
    "evals_per_epoch": "give train.eval_every in steps",
    "saves_per_epoch": "give train.save_every in steps",
    # The loop
    "resume_from_checkpoint": "use `nibble train --resume`",
    "auto_resume_from_checkpoints": "use `nibble train --resume`",
    "resume": "use `nibble train --resume`",
    "overwrite_output_dir": "name another output_dir: remove it",
    "max_steps_per_epoch": "give train.max_steps",
    "auto_find_batch_size": "give fit: auto, which finds the largest that fits",
    "do_eval": "there is an evaluation whenever there is held-out data: remove it",
    "logging_first_step": "metrics.jsonl has every step: remove it",
    "load_best_model_at_end": "the last checkpoint is the result: remove it",
    "metric_for_best_model": "the last checkpoint is the result: remove it",
    "early_stopping_patience": "early stopping is not supported yet: remove it",
    "save_only_model": "checkpoints always hold all that a resumed run needs: remove it",
    "save_safetensors": "every file is safetensors: remove it",
    "profiler*": "give train.profile, such as {start_step: 3, num_steps: 2}",
    "gradient_checkpointing_kwargs*": "only use_reentrant: false is known: remove it",
    # Kernels
    "*flash_attn*": _KERNELS,
    "flash_attention": _KERNELS,
    "attn_*": _KERNELS,
    "flex_attention": _KERNELS,
    "sdp_attention": _KERNELS,
    "xformers_attention": _KERNELS,
    "s2_attention": _KERNELS,
    "liger_*": _KERNELS,
    "lora_*_kernel": _KERNELS,
    "use_unsloth*": _KERNELS,
    "torch_compile*": _KERNELS,
    "compile": _KERNELS,
    "tf32": _KERNELS,
    "use_cache": _KERNELS,
    # Reports and files
    "hub_*": _HUB,
    "push_to_hub*": _HUB,
    "mlflow*": _TRACKER,
    "comet*": _TRACKER,
    "use_mlflow": _TRACKER,
    "use_comet": _TRACKER,
    "swanlab*": _TRACKER,
    "use_swanlab": _TRACKER,
    "trackio*": _TRACKER,
    "wandb_*": _ENVIRONMENT,
    "logging_dir": "logs are written to the run folder: remove it",
    "plot_loss": "metrics.jsonl has every step: remove it",
    "plugins": "plugins are not supported: remove it",
    "metric_logger*": "give report.sinks: progress, plain, tensorboard, wandb",
    "strict": "a recipe is always strict: remove it",
}


def refusal(word: str) -> str | None:
    """Why a known word of another trainer is not accepted, or None for a word not in the table."""
    for pattern, reason in REFUSED.items():
        if word == pattern or ("*" in pattern and fnmatchcase(word, pattern)):
            return reason
    return None
