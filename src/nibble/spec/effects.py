"""Settings that do something only under certain other choices: one row each.

Given outside of that a setting is refused (`rules.py`), because a key without effect would let a
user believe in it. Predicates on a recipe, without side effects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .builtin_models import is_builtin
from .config import Recipe
from .methods import is_low_rank, low_rank

Predicate = Callable[[Recipe], bool]

HQQ, FOUR_BIT = ("hqq",), ("nf4", "fp4")
NO_ADAPTER = ("none", "expand")
LOW_RANK = ("lora", "dora")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A setting works only `where`; `only` says so in words. `neutral` values claim nothing."""

    path: str
    where: Predicate
    only: str
    neutral: tuple[Any, ...] = ()


def base_format(*formats: str) -> Predicate:
    return lambda r: r.quant.format in formats


def adapter_kind(*kinds: str) -> Predicate:
    return lambda r: r.adapter.kind in kinds


def optimizer(*names: str) -> Predicate:
    return lambda r: r.optim.name in names


def projects(r: Recipe) -> bool:
    """Gradients are projected to a low rank."""
    return is_low_rank(r.optim)


def residual_grows(r: Recipe) -> bool:
    """What is used of the gradient outside of the basis may grow from step to step."""
    low = low_rank(r.optim)
    return low is not None and low.can_grow


def causal(r: Recipe) -> bool:
    return r.model.task == "causal-lm"


def quantised(r: Recipe) -> bool:
    return r.quant.format != "none"


def has_answers(r: Recipe) -> bool:
    """Whether some training source may have a prompt and an answer."""
    texts = r.data.train and all(s.format == "text" for s in r.data.train)
    return causal(r) and not r.data.streaming and not texts


def held_out(r: Recipe) -> bool:
    return bool(r.data.eval) or any((r.data.eval_rows, r.data.eval_tokens))


def wandb(r: Recipe) -> bool:
    return "wandb" in r.report.sinks


def hub_model(r: Recipe) -> bool:
    path = r.model.path
    local = path.endswith(".gguf") or path.startswith((".", "/", "~", "\\"))
    return not local and not is_builtin(path)


def placement(*kinds: str) -> Predicate:
    """The recipe's tensors live in one of these ways."""
    return lambda r: r.place.kind in kinds


def recomputes(r: Recipe) -> bool:
    """Some activations are forgotten and computed again."""
    return r.train.activation_checkpointing != "none"


EFFECT: tuple[Effect, ...] = (
    Effect(path="model.revision", where=hub_model, only="for a hub id in model.path"),
    Effect(path="model.num_labels", where=lambda r: not causal(r),
           only="with model.task=classification"),
    Effect(path="model.vocab_size", where=lambda r: r.model.from_scratch,
           only="with model.from_scratch"),
    Effect(path="data.packing", where=lambda r: causal(r) and not r.data.streaming,
           only="with model.task=causal-lm, and without data.streaming, which fills rows anyway"),
    *(Effect(path=f"data.{word}", where=lambda r: not r.data.streaming, neutral=neutral,
             only="without data.streaming")
      for word, neutral in (("too_long", ("truncate",)), ("eval_rows", ()), ("cache_dir", ()))),
    Effect(path="data.eval_tokens", where=lambda r: r.data.streaming, only="with data.streaming"),
    Effect(path="data.loss_on", where=has_answers, neutral=("all",),
           only="for causal-lm data with prompts and answers (text is trained whole)"),
    Effect(path="data.chat_template", where=has_answers, only="for causal-lm conversations"),
    Effect(path="data.system", where=has_answers, only="for causal-lm conversations"),
    Effect(path="quant.bits", where=base_format(*HQQ), only="with quant.format=hqq"),
    Effect(path="quant.block", where=base_format(*FOUR_BIT, *HQQ),
           only="with quant.format nf4, fp4 or hqq"),
    Effect(path="quant.double_quant", where=base_format(*FOUR_BIT),
           only="with quant.format nf4 or fp4"),
    Effect(path="quant.int8_threshold", where=base_format("int8"), only="with quant.format=int8"),
    Effect(path="quant.keep", where=quantised, only="with a quantised base (quant.format)"),
    Effect(path="quant.kernels", where=quantised, neutral=("auto",),
           only="with a quantised base (quant.format)"),
    Effect(path="adapter.rank", where=adapter_kind(*LOW_RANK, "factorised"),
           only="with adapter.kind lora, dora or factorised"),
    Effect(path="adapter.alpha", where=adapter_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.dropout", where=adapter_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.rank_stabilised", where=adapter_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.targets", where=adapter_kind(*LOW_RANK, "factorised"),
           only="with adapter.kind lora, dora or factorised"),
    Effect(path="adapter.modules_to_save", where=adapter_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.path", where=adapter_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.num_new_blocks", where=adapter_kind("expand"),
           only="with adapter.kind=expand"),
    Effect(path="optim.betas", where=optimizer("adamw", "adamw8bit", "lion", "adafactor-momentum"),
           only="with optim.name adamw, adamw8bit, lion or adafactor-momentum"),
    Effect(path="optim.eps",
           where=optimizer("adamw", "adamw8bit", "adafactor", "adafactor-momentum"),
           only="with optim.name adamw, adamw8bit, adafactor or adafactor-momentum"),
    Effect(path="optim.momentum", where=optimizer("sgd"), only="with optim.name=sgd"),
    Effect(path="optim.restart_every", where=adapter_kind("lora"), only="with adapter.kind=lora"),
    Effect(path="optim.restart_warmup_steps", where=lambda r: r.optim.restart_every is not None,
           only="with optim.restart_every"),
    *(Effect(path=f"optim.{word}", where=projects, only="with optim.method or optim.rank")
      for word in ("refresh_every", "scale", "side", "basis", "basis_storage", "residual",
                   "stagger", "lazy_threshold", "layerwise")),
    Effect(path="optim.in_backward", where=lambda r: r.optim.layerwise,
           only="with optim.layerwise"),
    Effect(path="optim.targets", where=projects, neutral=(("all-linear",),),
           only="with optim.method or optim.rank"),
    Effect(path="optim.weights", where=projects, neutral=("float",),
           only="with optim.method or optim.rank"),
    Effect(path="optim.norm_growth", where=residual_grows,
           only="with an optim.residual other than balanced, as fira and apollo have one"),
    Effect(path="optim.floor_ratio", where=lambda r: r.optim.schedule != "constant",
           only="with optim.schedule linear or cosine"),
    Effect(path="train.adapter_precision", where=adapter_kind(*LOW_RANK), neutral=("auto",),
           only="with adapter.kind lora or dora"),
    Effect(path="train.epochs",
           where=lambda r: r.train.max_steps is None and r.train.max_tokens is None,
           only="without train.max_steps and train.max_tokens, which decide"),
    Effect(path="train.eval_every", where=held_out,
           only="with data.eval, data.eval_rows or data.eval_tokens"),
    Effect(path="train.loss_chunk_tokens", where=causal, only="with model.task=causal-lm"),
    Effect(path="place.vram", where=lambda r: r.place.device != "cpu", only="on a GPU"),
    Effect(path="place.shard", where=placement("fsdp"), neutral=("full",),
           only="with place.kind=fsdp"),
    Effect(path="place.shard_group", where=lambda r: r.place.shard == "hybrid",
           only="with place.shard=hybrid"),
    Effect(path="place.zero_stage", where=placement("deepspeed"), only="with place.kind=deepspeed"),
    Effect(path="place.resident_blocks", where=placement("stream"), neutral=("auto",),
           only="with place.kind=stream"),
    Effect(path="place.ring_blocks", where=placement("stream"), only="with place.kind=stream"),
    Effect(path="place.num_devices", where=lambda r: r.place.kind != "single",
           only="with several devices (place.kind=single is one)"),
    Effect(path="train.keep_blocks", where=recomputes, only="with train.activation_checkpointing"),
    Effect(path="train.activation_offload", where=recomputes,
           only="with train.activation_checkpointing"),
    Effect(path="quant.cache", where=quantised,
           only="with a quantised base (quant.format)"),
    Effect(path="report.project", where=wandb, only="with wandb among report.sinks"),
    Effect(path="report.run_name", where=wandb, only="with wandb among report.sinks"),
)  # fmt: skip
