"""Fast paths through the blocks of known families: the same mathematics in fewer, fused steps.

Between its matrix products a block of transformers makes some sixty passes over memory (casts of
norms, halves of rotary embeddings, gates, sums of gradients), a kernel each; here some ten remain
(`nn/layer_functions.py`), and linears that read one input share the work of their adapters
(`nn/adapted.py`).

A fast path is a forward of our own on the *instance* of a norm, a feed-forward layer or an
attention; nobody's class is touched, names and parameters stay, and what a module holds is looked
up when it runs, so linears may be wrapped, quantised or sharded before or after. Which class has
which path is a table of values, read from transformers' source (5.17 to 5.23) and proven by tests
on every family. Attention itself stays the one that the config names, but for BLOOM's, which has
none but materialised scores (`nn/fused_alibi.py`); caches work as before.
Whatever is not in the table runs as transformers wrote it, and the summary says so.

Numerics: those of the models up to bf16 rounding, see `numerics/layer_functions.py`. A trained
adapter keeps a 16-bit copy beside its fp32 values (2 bytes a trained parameter) that is made anew
at the start of each pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibble.nn.adapted import Casts, adapted
from nibble.nn.adapters import LoraLinear, adapters
from nibble.nn.fused_alibi import FusedAlibiAttention
from nibble.nn.layer_functions import gate, gate_pair, rms_norm, rotate
from nibble.numerics.layer_functions import Activation

MODELS = "transformers.models."
NORM_EPS: dict[str, tuple[str, bool]] = {
    "LlamaRMSNorm": ("variance_epsilon", False),
    "MistralRMSNorm": ("variance_epsilon", False),
    "Qwen2RMSNorm": ("variance_epsilon", False),
    "Qwen3RMSNorm": ("variance_epsilon", False),
    "Phi3RMSNorm": ("variance_epsilon", False),
    "Gemma2RMSNorm": ("eps", True),
    "Gemma3RMSNorm": ("eps", True),
}
"""Class -> (attribute that holds eps, whether 1 + weight scales)."""

ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "GELUActivation": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class MlpShape:
    """Names in a feed-forward layer: `into` its input's linears (gate and up; one linear of both if
    `is_pair`; or one alone, without up), `out` the last, `activation` the module between, `dropout`
    the attribute with the probability of what drops behind `out`. A layer that is called with a
    residual adds it."""

    into: tuple[str, ...]
    out: str = "down_proj"
    activation: str = "act_fn"
    is_pair: bool = False
    dropout: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Names in an attention layer. `into`: q, k, v, or one linear of all three, in which those of a
    head lie side by side if `by_head`. `norms`: of q's and k's heads, where present. `window`:
    whose attribute `sliding_window` is. `softcap`: the attribute that caps scores. `dropout`: as in
    `MlpShape`."""

    into: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    norms: tuple[str, str] | None = None
    window: Literal["module", "config"] | None = None
    softcap: str | None = None
    by_head: bool = False
    head_dim: str = "head_dim"
    dropout: str | None = None


GATED = MlpShape(into=("gate_proj", "up_proj"))
MLPS: dict[str, MlpShape] = {
    "LlamaMLP": GATED,
    "MistralMLP": GATED,
    "Qwen2MLP": GATED,
    "Qwen3MLP": GATED,
    "Gemma2MLP": GATED,
    "Gemma3MLP": GATED,
    "Phi3MLP": MlpShape(into=("gate_up_proj",), activation="activation_fn", is_pair=True),
    "PhiMLP": MlpShape(into=("fc1",), out="fc2", activation="activation_fn"),
    "BloomMLP": MlpShape(
        into=("dense_h_to_4h",),
        out="dense_4h_to_h",
        activation="gelu_impl",
        dropout="hidden_dropout",
    ),
    "GPTNeoXMLP": MlpShape(into=("dense_h_to_4h",), out="dense_4h_to_h", activation="act"),
    "FalconMLP": MlpShape(into=("dense_h_to_4h",), out="dense_4h_to_h", activation="act"),
    "GPT2MLP": MlpShape(into=("c_fc",), out="c_proj", activation="act", dropout="dropout"),
    "Starcoder2MLP": MlpShape(
        into=("c_fc",), out="c_proj", activation="act", dropout="residual_dropout"
    ),
}
HEAD_NORMS = ("q_norm", "k_norm")
ATTENTIONS: dict[str, AttentionShape] = {
    "LlamaAttention": AttentionShape(),
    "MistralAttention": AttentionShape(window="config"),
    "Qwen2Attention": AttentionShape(window="module"),
    "Qwen3Attention": AttentionShape(window="module", norms=HEAD_NORMS),
    "Gemma2Attention": AttentionShape(window="module", softcap="attn_logit_softcapping"),
    "Gemma3Attention": AttentionShape(window="module", norms=HEAD_NORMS),
    "PhiAttention": AttentionShape(out="dense", norms=("q_layernorm", "k_layernorm")),
    "Phi3Attention": AttentionShape(into=("qkv_proj",), window="config"),
    "Starcoder2Attention": AttentionShape(window="config", dropout="residual_dropout"),
    "GPTNeoXAttention": AttentionShape(
        into=("query_key_value",), out="dense", by_head=True, head_dim="head_size"
    ),
}
ALIBI_ATTENTIONS = frozenset({"BloomAttention"})
"""Classes that `nn/fused_alibi.py` serves."""
NEEDS_PATH = ("Norm", "MLP", "Attention", "Moe", "MoE", "Experts")
"""Words in the names of classes that have or lack a fast path; LayerNorm is one kernel already."""


@dataclass(frozen=True, kw_only=True)
class FusedSummary:
    """How many modules took a fast path, and the classes within the model that have none."""

    norms: int
    mlps: int
    attentions: int
    lacking: tuple[str, ...]


def fuse_(model: nn.Module, decoder: nn.Module, *, dtype: torch.dtype) -> FusedSummary:
    """Give the modules of `model` their fast paths and return what was found.

    `decoder`: the module whose forward pass begins a pass through the blocks; adapters' copies in
    `dtype`, which the model computes in, are made there. Call it after `adapt_`, before blocks are
    wrapped or moved. Doing it twice changes nothing.
    """
    found = {"norm": 0, "mlp": 0, "attention": 0}
    lacking: set[str] = set()
    for module in model.modules():
        name = type(module).__name__
        if "forward" in vars(module):
            continue
        made = _path(module) if type(module).__module__.startswith(MODELS) else None
        if made is not None:
            kind, module.forward = made
            found[kind] += 1
        elif name != "LayerNorm" and any(word in name for word in NEEDS_PATH):
            lacking.add(name)
    _share_casts_(model, decoder, dtype)
    return FusedSummary(
        norms=found["norm"],
        mlps=found["mlp"],
        attentions=found["attention"],
        lacking=tuple(sorted(lacking)),
    )


def _path(module: nn.Module) -> tuple[str, Callable[..., Any]] | None:
    """The kind of a module and its fast forward, if it has one."""
    name = type(module).__name__
    if name in NORM_EPS:
        attribute, unit_offset = NORM_EPS[name]
        return "norm", FusedNorm(module, getattr(module, attribute), unit_offset)
    if name in MLPS:
        shape = MLPS[name]
        act = ACTIVATIONS.get(type(getattr(module, shape.activation)).__name__)
        return None if act is None else ("mlp", FusedMlp(module, shape, act))
    if name in ATTENTIONS:
        return "attention", FusedAttention(module, ATTENTIONS[name])
    if name in ALIBI_ATTENTIONS:
        return "attention", FusedAlibiAttention(module)
    return None


@dataclass(frozen=True)
class FusedNorm:
    """Forward of an RMS norm."""

    module: nn.Module
    eps: float
    unit_offset: bool

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return rms_norm(hidden_states, self.module, eps=self.eps, unit_offset=self.unit_offset)


@dataclass(frozen=True)
class FusedMlp:
    """Forward of a feed-forward layer."""

    module: nn.Module
    shape: MlpShape
    activation: Activation

    def __call__(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., D] to [..., D], added to the residual if given."""
        parts = together(_named(self.module, self.shape.into), hidden_states)
        if self.shape.is_pair:
            inner = gate_pair(parts[0], activation=self.activation)
        else:
            up = parts[1] if len(parts) > 1 else None
            inner = gate(parts[0], up, activation=self.activation)
        out: Tensor = getattr(self.module, self.shape.out)(inner)
        out = _drop(self.module, self.shape.dropout, out)
        return out if residual is None else residual + out


@dataclass(frozen=True)
class FusedAttention:
    """Forward of a self-attention layer with rotary positions."""

    module: Any
    shape: AttentionShape

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **words: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls its attention layers: [rows, tokens, D] to the same and weights.
        `layer_past` is GPT-NeoX's word for the cache."""
        module, lead = self.module, hidden_states.shape[:-1]
        past_key_values = layer_past if past_key_values is None else past_key_values
        q, k, v = (x.view(*lead, -1, self._head_dim()) for x in self._projected(hidden_states))
        if self.shape.norms is not None and self.shape.norms[0] in module._modules:
            q_norm, k_norm = _named(module, self.shape.norms)
            q, k = q_norm(q), k_norm(k)
        q, k = rotate(q, k, *position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        output, weights = _attention(module)(
            module,
            q,
            k,
            v,
            attention_mask,
            dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling,
            **self._own_words(),
            **words,
        )
        output = output.reshape(*lead, -1).contiguous()
        return _drop(module, self.shape.dropout, getattr(module, self.shape.out)(output)), weights

    def _head_dim(self) -> int:
        width: int = getattr(self.module, self.shape.head_dim)
        return width

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        made = together(_named(self.module, self.shape.into), x)
        if len(made) == 3:
            return made
        config, dim = self.module.config, self._head_dim()
        if self.shape.by_head:
            return made[0].view(*x.shape[:-1], -1, 3, dim).unbind(-2)
        keys = config.num_key_value_heads * dim
        return torch.split(made[0], [config.num_attention_heads * dim, keys, keys], dim=-1)

    def _own_words(self) -> dict[str, Any]:
        words: dict[str, Any] = {}
        if self.shape.window is not None:
            owner = self.module if self.shape.window == "module" else self.module.config
            words["sliding_window"] = getattr(owner, "sliding_window", None)
        if self.shape.softcap is not None:
            words["softcap"] = getattr(self.module, self.shape.softcap)
        return words


def _drop(module: nn.Module, name: str | None, x: Tensor) -> Tensor:
    """x behind the dropout that is the module's attribute `name`, a probability or a layer."""
    if name is None:
        return x
    found = getattr(module, name)
    return F.dropout(x, found.p if isinstance(found, nn.Dropout) else found, module.training)


def _attention(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention that the module's config names, as transformers finds it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[_family_class(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager
    )
    return found


def _family_class(module: Any) -> type:
    """The class that transformers wrote, beneath any that a library puts over it."""
    return next(c for c in type(module).__mro__ if c.__module__.startswith(MODELS))


def _named(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [getattr(module, name) for name in names]


def together(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of linears that read the same x; their adapters share their products where all
    are LoRA without dropout on frozen bases, and nobody hooks into one of them."""
    if len(linears) > 1 and not torch.is_autocast_enabled(x.device.type):
        joined = _joined(linears, x)
        if joined is not None:
            return joined
    return tuple(linear(x) for linear in linears)


def _joined(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    bases, updates = [], []
    for linear in linears:
        if not isinstance(linear, LoraLinear) or linear.magnitude is not None:
            return None
        base = linear.frozen_base()
        if base is None or (linear.dropout and linear.training) or _is_hooked(linear):
            return None
        bases.append(base)
        updates.append(linear.update(x))
    if len({update.a.dtype for update in updates}) > 1:
        return None
    return adapted(x, bases, updates)


def _is_hooked(linear: LoraLinear) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in (linear, linear.base)
    )


@dataclass(frozen=True)
class _Refresh:
    """Forward pre-hook of the decoder."""

    casts: Casts
    dtype: torch.dtype

    def __call__(self, _module: nn.Module, _inputs: object) -> None:
        if torch.is_grad_enabled():
            self.casts.refresh(self.dtype)


def _share_casts_(model: nn.Module, decoder: nn.Module, dtype: torch.dtype) -> None:
    """One set of copies for all adapters, those that read one input side by side."""
    lora = [m for m in adapters(model).values() if m.magnitude is None]
    if not lora or any(isinstance(h, _Refresh) for h in decoder._forward_pre_hooks.values()):
        return
    groups: list[list[nn.Module]] = []
    for module in model.modules():
        path = vars(module).get("forward")
        if isinstance(path, FusedMlp | FusedAttention):
            groups.append([m for m in _named(module, path.shape.into) if isinstance(m, LoraLinear)])
    grouped = {id(m) for group in groups for m in group}
    groups += [[m] for m in lora if id(m) not in grouped]
    casts = Casts(groups, names=("lora_A", "lora_B"))
    for module in lora:
        module.casts = casts
    decoder.register_forward_pre_hook(_Refresh(casts, dtype))
