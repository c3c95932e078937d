"""The words of a model's shape: a parameter, the style of a block, the layout of a family.

Idea. A transformer is a list of equal blocks between an embedding and a head. `Parameter` names one
tensor as transformers does; `BlockStyle` says which intermediate tensors a block keeps for its
backward pass (`spec/activations.py` prices them); `Layout` is what a family function of
`spec/arch_families.py` returns. `ConfigReader` and `Rows` are the pencils that they write with.

Values and integers only: no files, no torch, no families by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nibble.errors import WeightError

Kind = Literal[
    "linear", "embedding", "head", "classifier", "norm", "bias", "expert", "router", "other"
]
Norm = Literal["rms", "rms_fp32", "layer"]
Scores = Literal["fused", "eager", "softcap"]
Projection = Literal["split", "fused", "fused_rotated"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter: its name and shape as transformers has them, and what it is.

    `block` is the index of its block, None outside. `transposed`: stored (in, out), as GPT-2's
    Conv1D does.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    block: int | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        total = 1
        for dim in self.shape:
            total *= dim
        return total

    @property
    def module(self) -> str:
        """Name of the module that owns it."""
        return self.name.rpartition(".")[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of a linear, however it is stored."""
        out, in_features = self.shape[-2:]
        return (in_features, out) if self.transposed else (out, in_features)


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """What kind of block it is, as far as its kept activations go; see `spec/activations.py`.

    norm: rms (an fp32 copy is kept), rms_fp32 (Gemma: the scaling runs in fp32 as well), layer (one
    fused operation). projection: how query, key and value share storage: apart (split); views of
    one tensor (fused); query and key copied by the rotation and value a view of the whole
    (fused_rotated). scores: kept by a fused kernel as one number a row, or in full (eager), or in
    full and soft-capped (softcap).
    """

    norm: Norm = "rms"
    norms: int = 2
    shared_norm: bool = False
    """One normalised input feeds attention and MLP (Phi)."""
    shared_norm_input: bool = False
    """Two layer norms read the same residual stream (GPT-NeoX in parallel)."""
    post_norm: bool = False
    """Norms stand behind the residual sums (BERT)."""
    qk_norm: bool = False
    projection: Projection = "split"
    scores: Scores = "fused"
    gated: bool = True
    gate_fused: bool = False
    copied_output: bool = False
    """The attention's output is copied for the next linear (rotations made by concatenation)."""
    activation_copies: int = 1
    """Tensors of the MLP's width that the activation function keeps: 1; gelu_new keeps 4."""
    dropout: float = 0.0
    """Probability on the residual stream; a mask is kept when it is not zero."""
    attention_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a family of transformers."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a family function returns."""

    sizes: Sizes
    tied: bool
    style: BlockStyle
    parameters: tuple[Parameter, ...]
    body: str
    """Prefix of everything but the heads, such as `model`."""
    encoder: bool = False
    embedding_norm: bool = False
    num_experts: int = 0
    experts_per_token: int = 0


Family = Callable[[dict[str, Any]], Layout]


class ConfigReader:
    """Numbers of a config by transformers' names; a missing one is a WeightError naming it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.config.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise WeightError(f"config.json: {name}={value!r} is not a whole number")
                return value
        if default is None:
            raise WeightError(f"config.json: {names[0]} is missing; is this a whole model folder?")
        return default

    def sizes(
        self,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        ffn: str | None = "intermediate_size",
        positions: int = 2048,
        grouped: bool = True,
    ) -> Sizes:
        """The common numbers under all their names.

        `ffn` is the key of the MLP's width (None: four times the hidden size), `grouped` whether
        the family reads key heads and head dim at all; the others are defaults of absent keys.
        """
        hidden = self.number("hidden_size", "n_embd", "n_embed")
        heads = self.number("num_attention_heads", "n_head")
        width, dim = 4 * hidden, head_dim or hidden // heads
        if ffn is not None:
            width = self.number(ffn, default=width if ffn == "n_inner" else None)
        if kv_heads is None or "num_key_value_heads" in self.config:
            kv_heads = heads  # transformers reads an explicit null as "one for each head"
        if heads < 1:
            raise WeightError("config.json: num_attention_heads=0; it must be at least 1")
        return Sizes(
            hidden=hidden,
            num_layers=self.number("num_hidden_layers", "n_layer"),
            num_heads=heads,
            num_kv_heads=self.number("num_key_value_heads", default=kv_heads) if grouped else heads,
            head_dim=self.number("head_dim", default=dim) if grouped else dim,
            ffn=width,
            vocab=self.number("vocab_size"),
            max_positions=self.number(
                "max_position_embeddings", "n_positions", "seq_length", default=positions
            ),
        )

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)

    def rate(self, name: str, default: float = 0.0) -> float:
        value = self.config.get(name)
        return default if value is None else float(value)

    def activation(self, *names: str, default: str) -> int:
        """How many tensors the activation function keeps."""
        given = [self.config[name] for name in names if self.config.get(name)]
        return 4 if (given[0] if given else default) in ("gelu_new", "gelu_fast") else 1


class Rows:
    """Collects parameters in the order that transformers has them."""

    def __init__(self) -> None:
        self.all: list[Parameter] = []

    def linear(
        self, name: str, out: int, inside: int, *, bias: bool = False, block: int | None = None,
        kind: Kind = "linear", transposed: bool = False,
    ) -> None:  # fmt: skip
        shape = (inside, out) if transposed else (out, inside)
        self.add(f"{name}.weight", shape, kind, block, transposed=transposed)
        if bias:
            self.add(f"{name}.bias", (out,), "bias", block)

    def norm(self, name: str, size: int, *, bias: bool = False, block: int | None = None) -> None:
        self.add(f"{name}.weight", (size,), "norm", block)
        if bias:
            self.add(f"{name}.bias", (size,), "bias", block)

    def add(
        self, name: str, shape: tuple[int, ...], kind: Kind, block: int | None = None,
        *, transposed: bool = False,
    ) -> None:  # fmt: skip
        self.all.append(
            Parameter(name=name, shape=shape, kind=kind, block=block, transposed=transposed)
        )
