"""Fast paths of BLOOM's attention, whose scores have a bias for each key (ALiBi).

transformers adds the biases to materialised scores, row by row of the batch and head by head, in
some ten passes over [rows, heads, tokens, tokens]. Here the scores are never stored
(`numerics/alibi_attention.py`), and query, key and value are read where the projection wrote them.
The biases are those that the model computes, in its own type. Padding is what the last token of
each row may not see, as the mask of a causal model tells; it is read in place.

Caches, attention weights that are asked for and dropout of the probabilities take the model's own
way. Which function attends is a row in `ATTENTIONS`: the kernel of `kernels/layers.py`, or torch's
fused attention, to whose queries and keys the biases are appended as further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nibble.kernels.layers import layer_kernels

NUM_PIECES = 3
"""Numbers of 16 bit that add up to a bias of fp32."""
HEAD_MULTIPLE = 8
"""What the head dim of torch's fused attention must be a multiple of."""


def attend(qkv: Tensor, bias: Tensor, padding: Tensor | None, *, scale: float) -> Tensor:
    """What each token gets: qkv [rows, tokens, heads, 3, dim], bias [rows, heads, tokens] and
    padding [rows, tokens] as `numerics.alibi_attention` has them -> [rows, tokens, heads, dim].

    Backward keeps qkv, the result, and a number a head and token.
    """
    out: Tensor = _Attend.apply(qkv, bias, padding, scale)  # type: ignore[no-untyped-call]
    return out


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, padding: Tensor | None, scale: float
    ) -> Tensor:
        kernels = layer_kernels(qkv.device.type)
        out, sums = kernels.alibi_attention(qkv, bias, padding, scale=scale)
        ctx.scale = scale
        ctx.save_for_backward(qkv, out, sums, bias, padding)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        backward = layer_kernels(grad.device.type).alibi_attention_backward
        return backward(grad, *ctx.saved_tensors, scale=ctx.scale), None, None, None


def attend_by_sdpa(qkv: Tensor, bias: Tensor, padding: Tensor | None, *, scale: float) -> Tensor:
    """The same by torch's causal attention: q' = [q, 1, 1, 1], k' = [k, b_1, b_2, b_3] with
    b_1 + b_2 + b_3 = bias / scale, and v' = [v, 0]. Exact, for copies and a wider head."""
    rows, tokens, heads, _, dim = qkv.shape
    q, k, v = qkv.unbind(3)
    keys = bias.float() if padding is None else bias.float() + padding.float()[:, None]
    rest = (keys / scale).clamp_min(torch.finfo(qkv.dtype).min / 2).transpose(1, 2)
    pieces = []
    for _piece in range(NUM_PIECES):
        pieces.append(rest.to(qkv.dtype))
        rest = rest - pieces[-1].float()
    width = -(-(dim + NUM_PIECES) // HEAD_MULTIPLE) * HEAD_MULTIPLE
    spare = qkv.new_zeros(rows, tokens, heads, width - dim - NUM_PIECES)
    ones = qkv.new_ones(rows, tokens, heads, NUM_PIECES)
    out = F.scaled_dot_product_attention(
        torch.cat([q, ones, spare], dim=-1).transpose(1, 2),
        torch.cat([k, torch.stack(pieces, dim=-1), spare], dim=-1).transpose(1, 2),
        F.pad(v, (0, width - dim)).transpose(1, 2),
        is_causal=True,
        scale=scale,
    )
    return out.transpose(1, 2)[..., :dim]


ATTENTIONS: dict[str, Callable[..., Tensor]] = {"kernel": attend, "sdpa": attend_by_sdpa}
CHOSEN = "kernel"
"""Which of them attends; bench/int8_attention.py times both."""


@dataclass(frozen=True)
class FusedAlibiAttention:
    """Forward of BLOOM's self-attention layer."""

    module: Any

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **words: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers calls the layer: [rows, tokens, D] to the same with the residual added,
        and weights. alibi [rows * heads, 1, tokens], attention_mask [rows or 1, 1, tokens, tokens],
        added to the scores."""
        module = self.module
        if not self._serves(hidden_states, alibi, attention_mask, layer_past, output_attentions):
            plain: tuple[Tensor, Tensor | None] = type(module).forward(
                module, hidden_states, residual, alibi=alibi, attention_mask=attention_mask,
                layer_past=layer_past, use_cache=use_cache, output_attentions=output_attentions,
                **words,
            )  # fmt: skip
            return plain
        assert attention_mask is not None
        rows, tokens, _ = hidden_states.shape
        qkv = module.query_key_value(hidden_states)
        qkv = qkv.view(rows, tokens, module.num_heads, 3, module.head_dim)
        padding = attention_mask[:, 0, -1].expand(rows, tokens)
        bias = alibi.view(rows, module.num_heads, tokens)
        out = ATTENTIONS[CHOSEN](qkv, bias, padding, scale=module.inv_norm_factor)
        out = module.dense(out.reshape(rows, tokens, -1))
        return residual + F.dropout(out, module.hidden_dropout, module.training), None

    def _serves(
        self, x: Tensor, alibi: Tensor, mask: Tensor | None, past: Any, output_attentions: bool
    ) -> bool:
        """Whether a pass is a plain one over whole rows."""
        module, tokens = self.module, x.shape[1]
        drops = module.attention_dropout.p > 0 and module.training
        if past is not None or output_attentions or drops:
            return False
        if mask is None or mask.dtype == torch.bool or alibi.shape[-1] != tokens:
            return False
        return mask.shape[1:] == (1, tokens, tokens)
