"""Every rule refuses what it is for, and nothing that can be meant."""

from __future__ import annotations

from typing import Any

import pytest

from nibble.errors import ConfigError
from nibble.spec import rules, schema
from nibble.spec.config import Recipe
from nibble.spec.words import look_up

LORA = {"adapter": {"kind": "lora"}}
FILE = {"data": {"train": [{"path": "a.jsonl"}]}}
TEXT = {"data": {"train": [{"path": "a.txt", "format": "text"}]}}
STREAM = {"data": {"streaming": True}, "train": {"max_tokens": 1000}}
CLASSES = {"model": {"path": "m", "task": "classification"}}


def recipe(*parts: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {"model": {"path": "m"}}
    for part in parts:
        for section, values in part.items():
            both = isinstance(values, dict) and isinstance(tree.get(section), dict)
            tree[section] = {**tree[section], **values} if both else values
    return Recipe.model_validate(tree)


def refusal(*parts: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        rules.check(recipe(*parts))
    assert "\n" not in str(error.value)
    return str(error.value)


# path -> (where it does nothing, where it works), each with the setting itself
EFFECTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "model.revision": ([{"model": {"path": "./m", "revision": "x"}}],
                       [{"model": {"path": "a/m", "revision": "x"}}]),
    "model.num_labels": ([{"model": {"num_labels": 2}}], [CLASSES, {"model": {"num_labels": 2}}]),
    "model.vocab_size": ([{"model": {"vocab_size": 9}}],
                         [{"model": {"vocab_size": 9, "from_scratch": True}}]),
    "data.too_long": ([STREAM, {"data": {"too_long": "drop"}}], [{"data": {"too_long": "drop"}}]),
    "data.eval_rows": ([STREAM, {"data": {"eval_rows": 9}}], [{"data": {"eval_rows": 9}}]),
    "data.cache_dir": ([STREAM, {"data": {"cache_dir": "c"}}], [{"data": {"cache_dir": "c"}}]),
    "data.eval_tokens": ([{"data": {"eval_tokens": 9}}], [STREAM, {"data": {"eval_tokens": 9}}]),
    "data.packing": ([CLASSES, {"data": {"packing": True}}], [{"data": {"packing": True}}]),
    "data.loss_on": ([TEXT, {"data": {"loss_on": "answers"}}], [{"data": {"loss_on": "answers"}}]),
    "data.chat_template": ([CLASSES, {"data": {"chat_template": "a.jinja"}}],
                           [{"data": {"chat_template": "a.jinja"}}]),
    "data.system": ([TEXT, {"data": {"system": "Be brief."}}], [{"data": {"system": "x"}}]),
    "quant.bits": ([LORA, {"quant": {"format": "nf4", "bits": 4}}],
                   [LORA, {"quant": {"format": "hqq", "bits": 2}}]),
    "quant.block": ([LORA, {"quant": {"format": "int8", "block": 64}}],
                    [LORA, {"quant": {"format": "fp4", "block": 64}}]),
    "quant.double_quant": ([LORA, {"quant": {"format": "hqq", "double_quant": True}}],
                           [LORA, {"quant": {"format": "nf4", "double_quant": True}}]),
    "quant.int8_threshold": ([LORA, {"quant": {"format": "nf4", "int8_threshold": 6.0}}],
                             [LORA, {"quant": {"format": "int8", "int8_threshold": 0.0}}]),
    "quant.keep": ([{"quant": {"keep": ["a"]}}],
                   [LORA, {"quant": {"format": "nf4", "keep": ["a"]}}]),
    "quant.kernels": ([{"quant": {"kernels": "eager"}}],
                      [LORA, {"quant": {"format": "nf4", "kernels": "eager"}}]),
    "adapter.rank": ([{"adapter": {"rank": 16}}], [LORA, {"adapter": {"rank": 16}}]),
    "adapter.alpha": ([{"adapter": {"kind": "expand", "alpha": 32}}],
                      [LORA, {"adapter": {"alpha": 1}}]),
    "adapter.dropout": ([{"adapter": {"dropout": 0.1}}], [LORA, {"adapter": {"dropout": 0.1}}]),
    "adapter.rank_stabilised": ([{"adapter": {"rank_stabilised": True}}],
                                [LORA, {"adapter": {"rank_stabilised": True}}]),
    "adapter.targets": ([{"adapter": {"kind": "expand", "targets": ["q_proj"]}}],
                        [{"adapter": {"kind": "dora", "targets": ["q_proj"]}}]),
    "adapter.modules_to_save": ([{"adapter": {"kind": "expand", "modules_to_save": ["lm_head"]}}],
                                [LORA, {"adapter": {"modules_to_save": ["lm_head"]}}]),
    "adapter.path": ([{"adapter": {"path": "a"}}], [LORA, {"adapter": {"path": "a"}}]),
    "adapter.num_new_blocks": ([LORA, {"adapter": {"num_new_blocks": 2}}],
                               [{"adapter": {"kind": "expand", "num_new_blocks": 2}}]),
    "optim.betas": ([{"optim": {"name": "sgd", "betas": [0.9, 0.9]}}],
                    [{"optim": {"name": "adamw8bit", "betas": [0.9, 0.9]}}]),
    "optim.eps": ([{"optim": {"name": "sgd", "eps": 1e-6}}],
                  [{"optim": {"name": "adafactor", "eps": 1e-6}}]),
    "optim.momentum": ([{"optim": {"momentum": 0.9}}],
                       [{"optim": {"name": "sgd", "momentum": 0.9}}]),
    **{f"optim.{word}": ([{"optim": {word: value}}],
                         [{"optim": {word: value, "rank": 4, **more}}])
       for word, value, more in (
           ("refresh_every", 9, {}), ("scale", 0.5, {}), ("side", "left", {}),
           ("basis", "svd", {}), ("basis_storage", "bf16", {}), ("residual", "fira", {}),
           ("stagger", True, {}), ("lazy_threshold", 0.4, {}), ("layerwise", True, {}),
           ("targets", ["q_proj"], {}), ("weights", "int8", {}))},
    "optim.in_backward": (
        [{"optim": {"rank": 4, "in_backward": True, "max_grad_norm": None}}],
        [{"optim": {"rank": 4, "layerwise": True, "in_backward": True, "max_grad_norm": None}}]),
    "optim.restart_every": ([{"optim": {"restart_every": 9}}],
                            [LORA, {"optim": {"restart_every": 9}}]),
    "optim.restart_warmup_steps": (
        [LORA, {"optim": {"restart_warmup_steps": 9}}],
        [LORA, {"optim": {"restart_every": 9, "restart_warmup_steps": 9}}]),
    "optim.norm_growth": ([{"optim": {"rank": 4, "norm_growth": 1.1}}],
                          [{"optim": {"method": "fira", "norm_growth": 1.1}}]),
    "optim.floor_ratio": ([{"optim": {"schedule": "constant", "floor_ratio": 0.1}}],
                          [{"optim": {"floor_ratio": 0.1}}]),
    "train.adapter_precision": ([{"train": {"adapter_precision": "fp32"}}],
                                [LORA, {"train": {"adapter_precision": "fp32"}}]),
    "train.epochs": ([{"train": {"epochs": 1, "max_steps": 3}}], [{"train": {"epochs": 2}}]),
    "train.eval_every": ([{"train": {"eval_every": 5}}],
                         [{"train": {"eval_every": 5}, "data": {"eval_rows": 3}}]),
    "train.loss_chunk_tokens": ([CLASSES, {"train": {"loss_chunk_tokens": 64}}],
                                [{"train": {"loss_chunk_tokens": 64}}]),
    "place.vram": ([{"place": {"device": "cpu", "vram": "8GiB"}}], [{"place": {"vram": "8GiB"}}]),
    "place.shard": ([{"place": {"shard": "grad-op"}}],
                    [{"place": {"kind": "fsdp", "shard": "grad-op"}}]),
    "place.shard_group": ([{"place": {"kind": "fsdp", "shard_group": 2}}],
                          [{"place": {"kind": "fsdp", "shard": "hybrid", "shard_group": 2}}]),
    "place.zero_stage": ([{"place": {"zero_stage": 2}}],
                         [{"place": {"kind": "deepspeed", "zero_stage": 2}}]),
    "place.resident_blocks": ([{"place": {"resident_blocks": 3}}],
                              [LORA, {"place": {"kind": "stream", "resident_blocks": 3}}]),
    "place.ring_blocks": ([{"place": {"ring_blocks": 3}}],
                          [LORA, {"place": {"kind": "stream", "ring_blocks": 3}}]),
    "place.num_devices": ([{"place": {"kind": "single", "num_devices": 2}}],
                          [{"place": {"kind": "ddp", "num_devices": 2}}]),
    "train.keep_blocks": ([{"train": {"activation_checkpointing": "none", "keep_blocks": 2}}],
                          [{"train": {"keep_blocks": 2}}]),
    "train.activation_offload": (
        [{"train": {"activation_checkpointing": "none", "activation_offload": True}}],
        [{"train": {"activation_offload": True}}]),
    "quant.cache": ([{"quant": {"cache": True}}],
                    [LORA, {"quant": {"format": "nf4", "cache": True}}]),
    "report.project": ([{"report": {"project": "p"}}],
                       [{"report": {"project": "p", "sinks": ["wandb"]}}]),
    "report.run_name": ([{"report": {"run_name": "n"}}],
                        [{"report": {"run_name": "n", "sinks": ["wandb"]}}]),
}  # fmt: skip


def test_the_cases_cover_every_rule() -> None:
    assert set(EFFECTS) == {rule.path for rule in rules.EFFECT}
    assert set(CONTRADICTIONS) == {rule.name for rule in rules.CONTRADICTIONS}
    assert {rule.path for rule in rules.EFFECT} <= set(schema.fields())


@pytest.mark.parametrize("path", EFFECTS)
def test_a_setting_without_effect_is_refused(path: str) -> None:
    idle, working = EFFECTS[path]
    message = refusal(*idle)
    assert message.startswith(f"{path}=") and "has no effect: it works only" in message
    assert "; " not in message, "one mistake, one message"
    rules.check(recipe(*working))
    assert path in rules.without_effect(recipe(*idle))
    assert path not in rules.without_effect(recipe(*working))


def test_an_off_value_claims_nothing() -> None:
    off = {"quant": {"bits": None, "keep": [], "double_quant": False, "kernels": "auto"},
           "adapter": {"kind": "none", "dropout": 0.0, "path": None, "modules_to_save": []},
           "optim": {"momentum": 0.0}, "train": {"adapter_precision": "auto"}}  # fmt: skip
    rules.check(recipe(off))
    rules.check(recipe(TEXT, {"data": {"loss_on": "all"}}))


QUANT = {"quant": {"format": "nf4"}}
CONTRADICTIONS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "quantised base, nothing to train": ([QUANT], ["quant.format=nf4", "adapter.kind=none"]),
    "random base, quantised": (
        [LORA, QUANT, {"model": {"from_scratch": True}}],
        ["model.from_scratch", "quant.format=nf4"]),
    "random base, frozen": (
        [LORA, {"model": {"from_scratch": True}}], ["model.from_scratch", "adapter.kind=lora"]),
    "Triton on a CPU": (
        [LORA, QUANT, {"quant": {"kernels": "triton"}, "place": {"device": "cpu"}}],
        ["quant.kernels=triton", "place.device=cpu"]),
    "a shape without weights": ([{"model": {"path": "builtin:llama-9m"}}],
                                ["builtin:llama-9m", "from_scratch=true"]),
    "INT8 weights": (
        [LORA, {"optim": {"method": "q-galore", "weights": "int8"}}],
        ["optim.weights=int8", "adapter.kind=lora"]),
    "two ends": ([{"train": {"max_steps": 3, "max_tokens": 9}}],
                 ["train.max_steps=3", "train.max_tokens=9"]),
    "a stream without an end": ([{"data": {"streaming": True}}],
                                ["data.streaming", "train.max_tokens"]),
    "a stream of classes": ([CLASSES, STREAM], ["data.streaming", "classification"]),
    "factors of a given weight": ([{"adapter": {"kind": "factorised"}}],
                                  ["adapter.kind=factorised", "model.from_scratch"]),
    "restarts into packed or split bases": (
        [LORA, QUANT, {"optim": {"restart_every": 9}}],
        ["optim.restart_every=9", "quant.format=nf4"]),
    "low rank twice": ([LORA, {"optim": {"method": "galore"}}],
                       ["optim.method", "adapter.kind=lora"]),
    "whole gradients, layer by layer": (
        [{"optim": {"method": "fira", "layerwise": True}}],
        ["optim.layerwise", "optim.residual=fira", "optim.method=fira"]),
    "steps in backward": (
        [{"optim": {"rank": 4, "layerwise": True, "in_backward": True}}],
        ["optim.in_backward", "optim.max_grad_norm=1", "max_grad_norm=null"]),
    "wrong projection": ([{"optim": {"method": "apollo", "basis_storage": "int4"}}],
                         ["basis_storage=int4", "seeded"]),
    "8-bit states, stored otherwise": (
        [{"optim": {"name": "adamw8bit", "state": "bf16"}}],
        ["optim.name=adamw8bit", "optim.state=bf16"]),
    "bitsandbytes cannot unpack it": (
        [LORA, {"quant": {"format": "hqq", "kernels": "bitsandbytes"}}],
        ["quant.kernels=bitsandbytes", "quant.format=hqq"]),
    "fp16 on a CPU": (
        [{"train": {"precision": "fp16"}, "place": {"device": "cpu"}}],
        ["train.precision=fp16", "place.device=cpu", "bf16 or fp32"]),
    "adapters narrower than the run": (
        [LORA, {"train": {"precision": "fp32", "adapter_precision": "bf16"}}],
        ["train.adapter_precision=bf16", "train.precision=fp32"]),
    "two warm-ups": (
        [{"optim": {"warmup_steps": 5, "warmup_ratio": 0.1}}],
        ["optim.warmup_steps=5", "optim.warmup_ratio=0.1", "keep one"]),
    "two held-out sets": (
        [{"data": {"eval": [{"path": "e"}], "eval_rows": 5}}], ["data.eval ", "data.eval_rows=5"]),
    "graphs of what cannot be recorded": (
        [{"train": {"cuda_graphs": True}, "place": {"device": "cpu"}}],
        ["train.cuda_graphs=true", "place.device=cpu"]),
    "two views of one terminal": (
        [{"report": {"sinks": ["progress", "plain"]}}], ["progress and plain"]),
    "a sink twice": ([{"report": {"sinks": ["plain", "plain"]}}], ["[plain, plain]", "twice"]),
    "unknown device": ([{"place": {"device": "gpu0"}}], ["place.device=gpu0", "cuda:N"]),
    "profile after the end": (
        [{"train": {"max_steps": 2, "profile": {"start_step": 3}}}],
        ["train.profile", "train.max_steps=2"]),
    "a share of one device": (
        [{"place": {"kind": "ddp", "device": "cuda:1"}}],
        ["place.kind=ddp", "place.device=cuda:1", "place.num_devices"]),
    "one row for several GPUs": ([{"place": {"kind": "dp"}}], "splits the rows of a pass"),
    "several GPUs in one process, without a GPU": (
        [{"place": {"kind": "dp", "device": "cpu"}}], ["place.kind=dp", "place.kind=ddp"]),
    "nothing frozen to stream": (
        [{"place": {"kind": "stream"}}],
        ["place.kind=stream", "adapter.kind=none", "place.kind=fsdp"]),
    "deepspeed with a quantised base": (
        [LORA, QUANT, {"place": {"kind": "deepspeed"}}],
        ["place.kind=deepspeed", "quant.format=nf4", "place.kind=fsdp"]),
    "deepspeed with an optimiser of matrices": (
        [{"place": {"kind": "deepspeed"}, "optim": {"name": "adafactor"}}],
        ["place.kind=deepspeed", "optim.name=adafactor", "adamw, lion or sgd", "place.kind=fsdp"]),
    "deepspeed with factors": (
        [{"place": {"kind": "deepspeed"}, "adapter": {"kind": "factorised"},
          "model": {"from_scratch": True}}],
        ["place.kind=deepspeed", "adapter.kind=factorised", "place.zero_stage=2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused(name: str) -> None:
    parts, needed = CONTRADICTIONS[name]
    message = refusal(*parts)
    assert all(part in message for part in needed), message


@pytest.mark.parametrize(
    "parts, needed",
    [
        ([LORA, {"adapter": {"targets": ["q_("]}}], ["adapter.targets", "'q_('"]),
        ([LORA, {"adapter": {"targets": []}}], ["adapter.targets is empty"]),
        ([LORA, QUANT, {"quant": {"keep": ["["]}}], ["quant.keep", "regular expression"]),
        ([{"place": {"vram": "many"}}], ["place.vram", "24GiB"]),
        ([{"data": {"train": [{"path": " "}]}}], ["data.train[0].path is empty"]),
        ([{"data": {"eval": [{"path": "a.csv", "split": "x"}]}}],
         ["data.eval[0].split=x", "a.csv is not a hub data set"]),
        ([{"data": {"train": [{"path": "builtin:dummy", "name": "x"}]}}], ["data.train[0].name"]),
        ([{"data": {"train": [{"path": "a", "format": "classification"}]}}],
         ["needs model.task=classification"]),
        ([CLASSES, {"data": {"train": [{"path": "a", "format": "alpaca"}]}}],
         ["data.train[0].format=alpaca", "use classification"]),
        ([{"data": {"train": [{"path": "a", "format": "messages", "template": "{x}"}]}}],
         ["data.train[0].template has no effect", "messages"]),
        ([{"data": {"train": [{"path": "a", "format": "alpaca", "template": "x"}]}}],
         ["data.train[0].template has no {column}"]),
        ([{"place": {"kind": "deepspeed"}, "optim": {"name": "adamw8bit"}}],
         ["optim.name=adamw8bit", "place.kind=deepspeed"]),
        ([{"place": {"kind": "deepspeed"}, "optim": {"state": "8bit"}}], ["optim.state=8bit"]),
        ([{"place": {"kind": "deepspeed"}, "optim": {"method": "galore"}}],
         ["optim.method=galore", "place.kind=fsdp"]),
        ([{"place": {"kind": "deepspeed"}, "optim": {"rank": 4}}], ["optim.rank"]),
    ],
)  # fmt: skip
def test_values_that_cannot_be_meant(parts: list[dict[str, Any]], needed: list[str]) -> None:
    message = refusal(*parts)
    assert all(part in message for part in needed), message


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal(QUANT, {"adapter": {"rank": 4}, "optim": {"momentum": 0.9}})
    assert message.count("; ") >= 2


@pytest.mark.parametrize("kind", ["none", "lora", "dora", "expand"])
@pytest.mark.parametrize("store", ["none", "nf4", "fp4", "int8", "hqq", "ternary"])
def test_every_adapter_goes_on_every_format(kind: str, store: str) -> None:
    made = recipe({"adapter": {"kind": kind}, "quant": {"format": store}})
    if kind == "none" and store != "none":
        with pytest.raises(ConfigError):
            rules.check(made)
    else:
        rules.check(made)


def test_training_needs_data() -> None:
    rules.check_trainable(recipe(FILE))
    with pytest.raises(ConfigError, match=r"data\.train is missing: give data\.train=FILE"):
        rules.check_trainable(recipe())


def test_what_has_no_effect_can_be_found_in_the_recipe() -> None:
    dumped = recipe().model_dump()
    for path in rules.without_effect(recipe()):
        section, leaf = path.split(".")
        assert leaf in dumped[section] and look_up(dumped, section) is not None
