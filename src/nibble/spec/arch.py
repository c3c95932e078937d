"""The shape of a model: every parameter by name, from config.json or from its weights' headers.

Idea. What a run costs follows from shapes, and shapes follow from config.json: `arch_families.py`
knows the families whose parameters are a function of it. Any other model is read from the headers
of its safetensors or GGUF files (`headers.py`): names and shapes are then exact and kinds are
inferred from them. FLOPs are two a weight and token for each matrix product, and four a pair of
token and head dim for attention (half of it when causal); lookups and norms count nothing.

A hub id is looked up in the local hub cache by the layout that huggingface_hub documents
(HF_HOME/hub/models--ORG--NAME/refs and snapshots), config.json first. Nothing is downloaded and
nothing is built: it takes milliseconds and needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nibble.errors import PlanError, WeightError
from nibble.spec.arch_families import FAMILIES, head_of
from nibble.spec.arch_types import BlockStyle, ConfigReader, Kind, Parameter, Sizes
from nibble.spec.builtin_models import config_of, is_builtin
from nibble.spec.config import Model
from nibble.spec.headers import TensorHeader, read_config, read_gguf, read_headers

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BLOCK = re.compile(r"\.(\d+)\.")
_EMBEDDINGS = re.compile(
    r"(embed_tokens|embed_in|word_embeddings|position_embeddings|token_type_embeddings|wte|wpe|"
    r"tok_embeddings|token_embd|position_embd)\.weight$"
)
_HEADS = re.compile(r"^(lm_head|output|embed_out)\.weight$")


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A model's shape. `parameters` holds each distinct tensor once: a tied head is not listed.

    `source`: `config` (the block's style is the family's own), `headers` or `meta` (names and
    shapes are exact, and the block is taken to be a Llama's). Compared by identity, so that what
    follows from one can be remembered.
    """

    model_type: str
    sizes: Sizes
    parameters: tuple[Parameter, ...]
    style: BlockStyle
    tied: bool
    encoder: bool = False
    embedding_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    source: Literal["config", "headers", "meta"] = "config"

    @property
    def num_parameters(self) -> int:
        """Weights in all, each tensor once."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return not self.encoder

    @cached_property
    def linears(self) -> tuple[Parameter, ...]:
        """Matrices of the blocks that products read, experts and routers apart."""
        return tuple(p for p in self.parameters if p.kind == "linear")

    @cached_property
    def linear_widths(self) -> tuple[int, int]:
        """Outputs and inputs of one token through all of these."""
        shapes = [p.matrix for p in self.linears]
        return sum(out for out, _ in shapes), sum(inside for _, inside in shapes)

    @cached_property
    def head_size(self) -> int:
        """Weights of the product that makes the logits, tied or not; 0 for a classifier."""
        if any(parameter.kind == "classifier" for parameter in self.parameters):
            return 0
        return self.sizes.vocab * self.sizes.hidden

    @cached_property
    def matmul_size(self) -> int:
        """Weights that one token meets, without the head: of a mixture the active ones only."""
        active = 0
        for parameter in self.parameters:
            if parameter.kind in ("linear", "router", "classifier"):
                active += parameter.size
            elif parameter.kind == "expert":
                active += parameter.size * self.experts_per_token // max(self.num_experts, 1)
        return active

    def attention_flops_per_token(self, context: float) -> float:
        """Forward FLOPs of scores and their sums over rows of `context` tokens, all blocks."""
        seen = context / 2 if self.causal else context
        sizes = self.sizes
        return 4.0 * seen * sizes.num_heads * sizes.head_dim * sizes.num_layers

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of one token in rows of `context` tokens, head included."""
        matrices = 2.0 * (self.matmul_size + self.head_size)
        return matrices + self.attention_flops_per_token(context)


def architecture(model: Model, *, num_labels: int | None = None) -> Architecture:
    """The shape of the model that a recipe names; `num_labels` overrides the recipe's and config's.

    Raises WeightError for a folder without config.json, a damaged file or a hub id that is not in
    the local cache; PlanError for an unknown family without weights to read the shapes from.
    """
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        return from_gguf(path)
    if is_builtin(model.path):
        return from_config(_resized(config_of(model.path), model))
    folder = path if path.is_dir() else cached_snapshot(model.path, revision=model.revision)
    config = _resized(read_config(folder), model)
    labels = None
    if model.task == "classification":
        labels = num_labels or model.num_labels or _labels_of(config)
    if str(config.get("model_type")) in FAMILIES:
        return from_config(config, num_labels=labels)
    try:
        headers = read_headers(folder)
    except WeightError as error:
        raise PlanError(
            f"{model.path}: the family {config.get('model_type')!r} is not in the planner's table "
            f"({', '.join(FAMILIES)}) and its shapes cannot be read from weights: {error}"
        ) from None
    return from_headers(config, headers)


def _resized(config: dict[str, Any], model: Model) -> dict[str, Any]:
    """The configuration with the vocabulary that the recipe gives it."""
    return config if model.vocab_size is None else {**config, "vocab_size": model.vocab_size}


def from_config(config: Mapping[str, Any], *, num_labels: int | None = None) -> Architecture:
    """The shape that follows from a config.json of a family in the table.

    `num_labels`: a sequence classifier of that many classes; None is a language model. Raises
    PlanError for another family, WeightError for a config without the numbers.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise PlanError(
            f"the family {model_type!r} cannot be planned from its config alone; known are "
            f"{', '.join(FAMILIES)}: give a folder with its .safetensors files"
        )
    layout = FAMILIES[model_type](dict(config))
    parameters = layout.parameters
    if num_labels is not None:
        # A classifier has no language-model head, tied or not.
        parameters = tuple(p for p in parameters if not p.name.startswith("lm_head."))
    return Architecture(
        model_type=model_type,
        sizes=layout.sizes,
        parameters=parameters + head_of(model_type, layout, num_labels=num_labels),
        style=layout.style,
        tied=layout.tied,
        encoder=layout.encoder,
        embedding_norm=layout.embedding_norm,
        num_experts=layout.num_experts,
        experts_per_token=layout.experts_per_token,
    )


def from_headers(
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    *,
    model_type: str = "",
    source: Literal["headers", "meta"] = "headers",
) -> Architecture:
    """The shape read from tensor headers, kinds inferred from names and dims.

    `source`: whether they are those of files, or of a model built on the meta device.

    Raises PlanError when no repeated blocks can be seen in the names.
    """
    text = config.get("text_config")
    words = {**config, **text} if isinstance(text, Mapping) else dict(config)
    parameters = tuple(_infer(name, header) for name, header in headers.items())
    blocks = [p.block for p in parameters if p.block is not None]
    tables = [p for p in parameters if p.kind == "embedding"]
    if not blocks or not tables:
        raise PlanError(
            f"the family {config.get('model_type')!r}: no repeated blocks or no embedding among "
            f"{len(parameters)} tensors; it cannot be planned from its headers"
        )
    table = max(tables, key=lambda p: p.size)
    words.setdefault("vocab_size", table.shape[0])
    words.setdefault("hidden_size", table.shape[1])
    words.setdefault("num_hidden_layers", max(blocks) + 1)
    widest = max(max(p.shape) for p in parameters if p.block is not None)
    words.setdefault("intermediate_size", widest)
    words.setdefault("num_attention_heads", max(1, table.shape[1] // 128))
    reader = ConfigReader(words)
    experts = [p for p in parameters if p.kind == "expert"]
    return Architecture(
        model_type=model_type or str(config.get("model_type")),
        sizes=reader.sizes(),
        parameters=parameters,
        style=BlockStyle(),
        tied=not any(p.kind == "head" for p in parameters),
        num_experts=experts[0].shape[0] if experts else 0,
        experts_per_token=reader.number("num_experts_per_tok", "top_k", default=2)
        if experts
        else 0,
        source=source,
    )


_GGUF_WORDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}


def from_gguf(path: Path) -> Architecture:
    """The shape of a .gguf file: by the family's table where it is known, else by its headers."""
    metadata, headers = read_gguf(path) if path.is_file() else _missing(path)
    name = str(metadata.get("general.architecture"))
    config: dict[str, Any] = {"model_type": {"gemma3": "gemma3_text"}.get(name, name)}
    for key, word in _GGUF_WORDS.items():
        value = metadata.get(f"{name}.{key}")
        if isinstance(value, int):
            config[word] = value
    table = headers.get("token_embd.weight")
    if table is not None:
        config["vocab_size"] = table.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in headers
    if name == "llama" and config.get("num_local_experts"):
        config["model_type"] = "mixtral"
    if config["model_type"] in FAMILIES:
        return from_config(config)
    return from_headers(config, headers)


def cached_snapshot(hub_id: str, *, revision: str | None = None) -> Path:
    """The folder of a hub id in the local hub cache.

    Raises WeightError when it is no hub id or not cached; downloading is the caller's affair.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise WeightError(f"{hub_id}: no such folder, and not a hub id such as org/name")
    repository = hub_cache() / ("models--" + hub_id.replace("/", "--"))
    wanted = revision or "main"
    reference = repository / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = repository / "snapshots" / commit
    if not (snapshot / "config.json").is_file():
        raise WeightError(
            f"{hub_id}: no such folder, and not in the hub cache"
            f"{f' at revision {revision}' if revision else ''}; download it first"
        )
    return snapshot


def hub_cache() -> Path:
    """Where huggingface_hub keeps its files: HF_HUB_CACHE, or hub in HF_HOME, or its default."""
    given = os.environ.get("HF_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "huggingface" / "hub"


def _labels_of(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    return len(names) if isinstance(names, Mapping) and names else 2


def _infer(name: str, header: TensorHeader) -> Parameter:
    """A parameter from its name and shape, when no table knows the family."""
    found = _BLOCK.search(name)
    block = int(found[1]) if found else None
    dims = len(header.shape)
    kind: Kind
    if _EMBEDDINGS.search(name):
        kind, block = "embedding", None
    elif _HEADS.search(name):
        kind = "head"
    elif dims == 3:
        kind = "expert"
    elif dims == 2:
        kind = "linear" if block is not None else "other"
    elif name.endswith("bias"):
        kind = "bias"
    else:
        kind = "norm"
    return Parameter(name=name, shape=header.shape, kind=kind, block=block)


def _missing(path: Path) -> Any:
    raise WeightError(f"{path}: no such file")
