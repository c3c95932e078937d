"""What must be known of a model family, found by looking at the model rather than by its name
wherever that is safe.

The repeated blocks are the longest list of modules; the decoder is the base model that returns
hidden states; the head is the output embedding. Two facts cannot be seen in the modules and are
stated from the families' code, each proven by a test against transformers' own logits: which
families' logits are transform(head(hidden)) and nothing else (for all others the loss must ask the
model for its logits), and which masks honour position ids that start again at 0 inside a row, so
that several documents may share one. It costs one walk over the modules and reads no weights.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# fmt: off
PLAIN_HEADS = frozenset({
    "apertus", "arcee", "bloom", "cohere", "cohere2", "cwm", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "flex_olmo", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "llama", "minimax_m2", "ministral", "mistral", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
})
# fmt: on
"""Families whose logits are `transform(head(decoder(x)))`, the transform being read from the
configuration."""

RECURRENT = ("mamba", "deltanet", "recurrent", "rwkv", "shortconv", "linearattention", "ssm", "lru")
"""Class names (in lower case) of layers whose state runs on from one document of a row into the
next."""


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a family does to the head's output: y = softcap * tanh(scale * x / softcap), or scale *
    x without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits of any shape; returns the same tensor when there is nothing to do."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one built model; paths are module names that stay valid after linears were replaced
    or wrapped.

    `logits` is None when the loss must take the logits from the model itself. `max_positions` is
    the context length that the configuration names; with `learned_positions` it is a hard limit,
    because positions are rows of a table. `can_pack` holds with attention_mask=None,
    use_cache=False and position_ids that restart at 0.
    """

    model_type: str
    block_path: str
    decoder_path: str
    head_path: str | None
    logits: LogitTransform | None
    can_pack: bool
    max_positions: int | None
    learned_positions: bool

    @property
    def has_position_limit(self) -> bool:
        """Whether a longer row cannot be computed at all."""
        return self.learned_positions and self.max_positions is not None

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The repeated layers in order, with their full names."""
        return [
            (f"{self.block_path}.{name}", block)
            for name, block in model.get_submodule(self.block_path).named_children()
        ]

    def decoder(self, model: nn.Module) -> nn.Module:
        """The base model, whose first output is the last hidden state after the final norm."""
        return model.get_submodule(self.decoder_path)

    def head(self, model: nn.Module) -> nn.Module | None:
        """The output embedding; None where there is none, as in classification."""
        return None if self.head_path is None else model.get_submodule(self.head_path)


def describe(model: nn.Module, *, task: str = "causal-lm") -> Family:
    """Find the facts of a transformers model as it was built, before anything in it is replaced."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.base_model
    head = model.get_output_embeddings() if task == "causal-lm" else None  # type: ignore[operator]
    model_type = str(text.model_type)
    return Family(
        model_type=model_type,
        block_path=_block_path(model),
        decoder_path=names[id(decoder)],
        head_path=None if head is None else names[id(head)],
        logits=_logit_transform(text) if head is not None and model_type in PLAIN_HEADS else None,
        can_pack=task == "causal-lm" and _can_pack(decoder, text),  # type: ignore[arg-type]
        max_positions=_max_positions(text),
        learned_positions=_has_position_table(model),
    )


def _block_path(model: nn.Module) -> str:
    """The list of modules that holds the most parameters; lists inside lists (experts) are part of
    a block."""
    best, best_size = "", -1
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or (best and name.startswith(f"{best}.")):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best_size:
            best, best_size = name, size
    return best


def _logit_transform(config: Any) -> LogitTransform:
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None)
    if config.model_type == "mpt":
        # MPT's own logit_scale is read by nothing in transformers' model.
        scale = None
    factor = 1.0 if scale is None else float(scale)
    if divisor is not None:
        factor /= float(divisor)
    return LogitTransform(scale=factor, softcap=None if softcap is None else float(softcap))


def _can_pack(decoder: nn.Module, config: Any) -> bool:
    """Whether the family's mask code sees position ids and no layer carries a state along the
    row."""
    parameters = inspect.signature(decoder.forward).parameters
    module = sys.modules[type(decoder).__module__]
    if "position_ids" not in parameters or "create_causal_mask" not in vars(module):
        return False
    if getattr(config, "alibi", False) or not getattr(config, "is_decoder", True):
        return False
    if type(decoder).__name__ not in _masked_with_positions(module):
        return False
    kinds = [type(inner).__name__.lower() for inner in decoder.modules()]
    return not any(word in kind for kind in kinds for word in RECURRENT)


def _masked_with_positions(module: Any) -> set[str]:
    """Classes of a modelling file that hand position ids to the mask: without them a mask cannot
    know the documents."""
    found = set()
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            source = inspect.getsource(value)
            if "create_causal_mask" in source and "position_ids" in source.split(
                "create_causal_mask", 1
            )[1].replace("position_ids=None", ""):
                found.add(name)
    return found


def _max_positions(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa's first position is padding_idx + 1: two rows of its table are never reached.
            offset = 2 if config.model_type in ("roberta", "camembert", "xlm-roberta") else 0
            return value - offset
    return None


def _has_position_table(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] in ("wpe", "position_embeddings", "embed_positions")
        for name, module in model.named_modules()
    )
