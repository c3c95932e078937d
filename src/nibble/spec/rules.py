"""What cannot be combined: contradictions, and settings that would have no effect.

Two tables. `EFFECT` says when a setting does anything at all; given outside of that it is refused,
because a key without effect would let a user believe in it (an off value such as false, 0, [] or
null is no claim and passes). `CONTRADICTIONS` are combinations that cannot be meant. Both are plain
predicates on a recipe, so they run before anything is loaded, and `without_effect` also tells
`load.py` what to leave out of the resolved recipe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from nibble.errors import ConfigError

from .config import Recipe, Source
from .texts import show
from .units import parse_bytes

Predicate = Callable[[Recipe], bool]

HQQ, FOUR_BIT = ("hqq",), ("nf4", "fp4")
LOW_RANK = ("lora", "dora")
LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".xz", ".gz", ".bz2")
PROMPT_FORMATS = ("auto", "alpaca", "prompt-completion")
DEVICE = re.compile(r"^(auto|cpu|cuda(:\d+)?)$")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A setting works only `where`; `only` says so in words. `neutral` values claim nothing."""

    path: str
    where: Predicate
    only: str
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A combination that is refused: its name, when it holds, and what to say."""

    name: str
    holds: Predicate
    message: Callable[[Recipe], str]


def _format(*formats: str) -> Predicate:
    return lambda r: r.quant.format in formats


def _kind(*kinds: str) -> Predicate:
    return lambda r: r.adapter.kind in kinds


def _optimizer(*names: str) -> Predicate:
    return lambda r: r.optim.name in names


def _causal(r: Recipe) -> bool:
    return r.model.task == "causal-lm"


def _quantised(r: Recipe) -> bool:
    return r.quant.format != "none"


def _has_answers(r: Recipe) -> bool:
    """Whether some training source may have a prompt and an answer."""
    return _causal(r) and not (r.data.train and all(s.format == "text" for s in r.data.train))


def _held_out(r: Recipe) -> bool:
    return bool(r.data.eval) or r.data.eval_rows is not None


def _wandb(r: Recipe) -> bool:
    return "wandb" in r.report.sinks


def _hub_model(r: Recipe) -> bool:
    path = r.model.path
    return not path.endswith(".gguf") and not path.startswith((".", "/", "~", "\\"))


EFFECT: tuple[Effect, ...] = (
    Effect(path="model.revision", where=_hub_model, only="for a hub id in model.path"),
    Effect(path="model.num_labels", where=lambda r: not _causal(r),
           only="with model.task=classification"),
    Effect(path="data.packing", where=_causal, only="with model.task=causal-lm"),
    Effect(path="data.loss_on", where=_has_answers, neutral=("all",),
           only="for causal-lm data with prompts and answers (text is trained whole)"),
    Effect(path="data.chat_template", where=_has_answers, only="for causal-lm conversations"),
    Effect(path="data.system", where=_has_answers, only="for causal-lm conversations"),
    Effect(path="quant.bits", where=_format(*HQQ), only="with quant.format=hqq"),
    Effect(path="quant.block", where=_format(*FOUR_BIT, *HQQ),
           only="with quant.format nf4, fp4 or hqq"),
    Effect(path="quant.double_quant", where=_format(*FOUR_BIT),
           only="with quant.format nf4 or fp4"),
    Effect(path="quant.int8_threshold", where=_format("int8"), only="with quant.format=int8"),
    Effect(path="quant.keep", where=_quantised, only="with a quantised base (quant.format)"),
    Effect(path="quant.kernels", where=_quantised, neutral=("auto",),
           only="with a quantised base (quant.format)"),
    Effect(path="adapter.rank", where=_kind(*LOW_RANK), only="with adapter.kind lora or dora"),
    Effect(path="adapter.alpha", where=_kind(*LOW_RANK), only="with adapter.kind lora or dora"),
    Effect(path="adapter.dropout", where=_kind(*LOW_RANK), only="with adapter.kind lora or dora"),
    Effect(path="adapter.rank_stabilised", where=_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.targets", where=_kind(*LOW_RANK), only="with adapter.kind lora or dora"),
    Effect(path="adapter.modules_to_save", where=_kind(*LOW_RANK),
           only="with adapter.kind lora or dora"),
    Effect(path="adapter.path", where=_kind(*LOW_RANK), only="with adapter.kind lora or dora"),
    Effect(path="adapter.num_new_blocks", where=_kind("expand"), only="with adapter.kind=expand"),
    Effect(path="optim.betas", where=_optimizer("adamw", "adamw8bit"),
           only="with optim.name adamw or adamw8bit"),
    Effect(path="optim.eps", where=_optimizer("adamw", "adamw8bit", "adafactor"),
           only="with optim.name adamw, adamw8bit or adafactor"),
    Effect(path="optim.momentum", where=_optimizer("sgd"), only="with optim.name=sgd"),
    Effect(path="optim.floor_ratio", where=lambda r: r.optim.schedule != "constant",
           only="with optim.schedule linear or cosine"),
    Effect(path="train.adapter_precision", where=_kind(*LOW_RANK), neutral=("auto",),
           only="with adapter.kind lora or dora"),
    Effect(path="train.epochs", where=lambda r: r.train.max_steps is None,
           only="without train.max_steps, which decides"),
    Effect(path="train.eval_every", where=_held_out, only="with data.eval or data.eval_rows"),
    Effect(path="train.loss_chunk_tokens", where=_causal, only="with model.task=causal-lm"),
    Effect(path="place.vram", where=lambda r: r.place.device != "cpu", only="on a GPU"),
    Effect(path="report.project", where=_wandb, only="with wandb among report.sinks"),
    Effect(path="report.run_name", where=_wandb, only="with wandb among report.sinks"),
)  # fmt: skip

CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        name="quantised base, nothing to train",
        holds=lambda r: _quantised(r) and r.adapter.kind == "none",
        message=lambda r: (
            f"quant.format={r.quant.format} with adapter.kind=none: a quantised base "
            "cannot be trained; choose an adapter (lora, dora, expand) or quant.format=none"
        ),
    ),
    Contradiction(
        name="random base, quantised",
        holds=lambda r: r.model.from_scratch and _quantised(r),
        message=lambda r: (
            f"model.from_scratch with quant.format={r.quant.format}: a random base "
            "must be trained itself; use quant.format=none"
        ),
    ),
    Contradiction(
        name="random base, frozen",
        holds=lambda r: r.model.from_scratch and r.adapter.kind != "none",
        message=lambda r: (
            f"model.from_scratch with adapter.kind={r.adapter.kind}: a random base "
            "must be trained itself; use adapter.kind=none"
        ),
    ),
    Contradiction(
        name="Triton on a CPU",
        holds=lambda r: r.quant.kernels == "triton" and r.place.device == "cpu",
        message=lambda r: (
            "quant.kernels=triton with place.device=cpu: Triton needs a GPU; use quant.kernels=auto"
        ),
    ),
    Contradiction(
        name="bitsandbytes cannot unpack it",
        holds=lambda r: r.quant.kernels == "bitsandbytes" and r.quant.format in ("hqq", "ternary"),
        message=lambda r: (
            f"quant.kernels=bitsandbytes with quant.format={r.quant.format}: it knows "
            "nf4, fp4 and int8; use quant.kernels=auto"
        ),
    ),
    Contradiction(
        name="fp16 on a CPU",
        holds=lambda r: r.train.precision == "fp16" and r.place.device == "cpu",
        message=lambda r: "train.precision=fp16 with place.device=cpu: use bf16 or fp32",
    ),
    Contradiction(
        name="adapters narrower than the run",
        holds=lambda r: r.train.adapter_precision == "bf16" and r.train.precision != "bf16",
        message=lambda r: (
            "train.adapter_precision=bf16 with "
            f"train.precision={r.train.precision}: use fp32 or auto"
        ),
    ),
    Contradiction(
        name="two warm-ups",
        holds=lambda r: r.optim.warmup_steps is not None and r.optim.warmup_ratio is not None,
        message=lambda r: (
            f"optim.warmup_steps={r.optim.warmup_steps} and "
            f"optim.warmup_ratio={r.optim.warmup_ratio} both set the warm-up: keep one"
        ),
    ),
    Contradiction(
        name="two held-out sets",
        holds=lambda r: bool(r.data.eval) and r.data.eval_rows is not None,
        message=lambda r: (
            f"data.eval and data.eval_rows={r.data.eval_rows} both name the held-out rows: keep one"
        ),
    ),
    Contradiction(
        name="two views of one terminal",
        holds=lambda r: {"progress", "plain"} <= set(r.report.sinks),
        message=lambda r: (
            "report.sinks has progress and plain, which write to one terminal: keep one"
        ),
    ),
    Contradiction(
        name="a sink twice",
        holds=lambda r: len(set(r.report.sinks)) < len(r.report.sinks),
        message=lambda r: f"report.sinks={show(r.report.sinks)} names a sink twice",
    ),
    Contradiction(
        name="unknown device",
        holds=lambda r: not DEVICE.match(r.place.device),
        message=lambda r: f"place.device={r.place.device} is not one of auto, cpu, cuda, cuda:N",
    ),
    Contradiction(
        name="profile after the end",
        holds=lambda r: (
            r.train.profile is not None
            and r.train.max_steps is not None
            and r.train.profile.start_step > r.train.max_steps
        ),
        message=lambda r: (
            "train.profile starts after train.max_steps="
            f"{r.train.max_steps}: lower train.profile.start_step"
        ),
    ),
)


def check(recipe: Recipe) -> None:
    """Raise ConfigError that names, in one line, all that cannot be meant."""
    problems = [rule.message(recipe) for rule in CONTRADICTIONS if rule.holds(recipe)]
    for path in without_effect(recipe):
        rule = _EFFECT_OF[path]
        value = _value(recipe, path)
        if _explicit(recipe, path) and value and value not in rule.neutral:
            problems.append(f"{path}={show(value)} has no effect: it works only {rule.only}")
    problems += _pattern_problems(recipe)
    problems += _source_problems(recipe)
    problems += _size_problems(recipe)
    if problems:
        raise ConfigError("; ".join(problems))


def check_trainable(recipe: Recipe) -> None:
    """Raise ConfigError when a run could not start: no training data is named."""
    if not recipe.data.train:
        raise ConfigError(
            "data.train is missing: give data.train=FILE (.jsonl, .json, .csv, .tsv, .parquet, "
            ".txt), a folder, or a hub data set"
        )


def without_effect(recipe: Recipe) -> list[str]:
    """Paths of the settings that do nothing under this recipe's other choices."""
    return [rule.path for rule in EFFECT if not rule.where(recipe)]


_EFFECT_OF = {rule.path: rule for rule in EFFECT}


def _value(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _explicit(recipe: Recipe, path: str) -> bool:
    """Whether somebody gave this setting, be it with its default."""
    here: BaseModel = recipe
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in here.model_fields_set:
            return False
        here = getattr(here, part)
    return leaf in here.model_fields_set


def _size_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.place.vram is not None:
        try:
            parse_bytes(recipe.place.vram)
        except ConfigError as error:
            yield str(error)


def _pattern_problems(recipe: Recipe) -> Iterator[str]:
    """Names that are neither names nor regular expressions."""
    lists = {"adapter.targets": recipe.adapter.targets, "quant.keep": recipe.quant.keep,
             "adapter.modules_to_save": recipe.adapter.modules_to_save}  # fmt: skip
    for path, patterns in lists.items():
        if path == "adapter.targets" and not patterns:
            yield "adapter.targets is empty: give all-linear, module names or patterns"
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{path}: {pattern!r} is not a regular expression: {error}"


def _source_problems(recipe: Recipe) -> Iterator[str]:
    for name, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources):
            where = f"data.{name}[{index}]"
            yield from (f"{where}{text}" for text in _one_source(source, recipe))


def _one_source(source: Source, recipe: Recipe) -> Iterator[str]:
    """What contradicts itself in one source; each text follows the source's place."""
    if not source.path.strip():
        yield ".path is empty: give a file, a folder or a hub data set"
    local = source.path.lower().endswith(LOCAL_SUFFIXES) or source.path.startswith("builtin:")
    for key, value in (("name", source.name), ("split", source.split)):
        if local and value is not None:
            yield f".{key}={value} has no effect: {source.path} is not a hub data set"
    classifies = recipe.model.task == "classification"
    if classifies and source.format not in ("auto", "classification"):
        yield f".format={source.format} with model.task=classification: use classification"
    if not classifies and source.format == "classification":
        yield ".format=classification needs model.task=classification"
    if source.template is not None:
        if classifies or source.format not in PROMPT_FORMATS:
            kind = "classification" if classifies else source.format
            yield f".template has no effect: {kind} has no prompt (alpaca, prompt-completion have)"
        elif not re.search(r"\{[^{}]+\}", source.template):
            yield f".template has no {{column}} in it: {show(source.template)}"
