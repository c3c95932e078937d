"""Attention over packed rows: documents that share a row never see one another.

Idea. A packed row holds documents 0..m-1 of lengths n_0..n_{m-1}; the allowed pairs are the
block-diagonal causal ones, sum_j n_j (n_j + 1) / 2 of the L (L + 1) / 2 of the whole row. A dense
mask of [rows, 1, L, L] spends memory and time on the zeros and keeps the fused kernels of scaled
dot-product attention away. Here the mask that transformers would build is replaced by the offsets
of the documents, cu_seqlens [m + 1], and attention runs document by document: one variable-length
kernel on CUDA (`torch.nn.attention.varlen`), a loop of plain causal attention elsewhere.

How it is hooked in. transformers looks up both the mask and the attention by
`config._attn_implementation` in registries that anyone may add to; `register()` adds the name
`PACKED`. The mask function is given as a predicate allowed(row, head, query, key); a token begins a
document exactly where it may not see the token before it, so L calls of the predicate yield the
offsets, whatever made them (position ids that restart, chunked attention). The offsets travel as
the layers' `attention_mask`, thus through activation checkpointing too. A model that does
arithmetic on the mask instead of handing it on fails loudly on its shape; it cannot leak silently.

Everything that is not packed causal training (padding, caches, bidirectional encoders, custom
masks) goes to transformers' own sdpa functions, which also stay the reference that the tests
compare with.

Costs: one host read a mask (transformers makes one itself to detect packing), none in the layers on
CUDA; none at all where the caller knows the offsets and gives them as the mask (`offsets_mask`).
Not here: soft-capped scores, position biases and sinks; transformers runs those families eagerly.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "nibble_packed"
"""The name under which transformers finds this attention."""

FLASH_MAX_HEAD_DIM = 256

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def register() -> str:
    """Make `PACKED` known to transformers and return it; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)
    return PACKED


def attention_name(model_class: Any, config: Any = None) -> str:
    """The attention that a transformers model class should be built with.

    `PACKED` needs a family whose layers call the attention interface and hand on its extra
    arguments, which transformers marks with two class attributes; the others keep what transformers
    picks for them. Soft-capped scores (`config`) have no fused kernel here: some versions of
    transformers would leave the cap out in silence.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"
    through_interface = bool(getattr(model_class, "_supports_attention_backend", False))
    sdpa = bool(getattr(model_class, "_supports_sdpa", False))
    if sdpa and through_interface:
        return register()
    return "sdpa" if sdpa else "eager"


def document_offsets(
    allowed: Allowed, *, rows: int, length: int, device: torch.device
) -> Tensor | None:
    """Offsets of the documents of `rows` rows laid end to end; None if the mask is not causal.

    Returns int32 [documents + 1, longest document]: the offsets, and, for the price of a stride of
    0, the one size that a kernel's launch needs on the host. allowed(row, head, query, key) is
    transformers' mask predicate; it is asked about neighbours only.
    """
    here = torch.arange(1, length, device=device)[None, :].expand(rows, -1)
    row = torch.arange(rows, device=device)[:, None].expand_as(here)
    head = torch.zeros((), dtype=torch.long, device=device)
    sees_previous = torch.as_tensor(allowed(row, head, here, here - 1), device=device)
    sees_next = torch.as_tensor(allowed(row, head, here - 1, here), device=device)
    begins = torch.ones(rows, length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees_previous.expand_as(here)
    begins[:, 0] &= ~sees_next.any()  # one read for both questions: no begin means "not causal"
    starts = begins.flatten().nonzero().flatten()
    edges = [*starts.tolist(), rows * length]
    if edges[0] != 0:
        return None
    longest = max(end - begin for begin, end in pairwise(edges))
    offsets = torch.cat([starts, starts.new_full((1,), rows * length)]).to(torch.int32)
    return offsets[:, None].expand(-1, longest)


def offsets_mask(offsets: Tensor, *, longest: int) -> Tensor:
    """Offsets int32 [documents + 1] of documents of at most `longest` tokens as an `attention_mask`
    that transformers hands on without looking at it, a view [documents + 1, 1, 1, longest].

    Documents may be empty. A single offset says that every row is one document.
    """
    return offsets.view(-1, 1, 1, 1).expand(-1, 1, 1, longest)


def is_offsets(mask: Tensor | None) -> bool:
    """Whether an `attention_mask` is what `document_offsets` or `offsets_mask` made; transformers'
    own are of other types."""
    return mask is not None and mask.dim() in (2, 4) and mask.dtype == torch.int32


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Allowed | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers hands to the layers as `attention_mask`: offsets of documents for packed
    rows, else sdpa's mask.

    The signature is transformers' (its mask interface calls by keyword and adds words of its own).
    """
    from transformers.masking_utils import sdpa_mask

    whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    plain = attention_mask is None and not use_vmap and not allow_is_bidirectional_skip
    if whole and plain and mask_function is not None and q_length > 1 and not allow_is_causal_skip:
        device = torch.device(device)
        offsets = document_offsets(mask_function, rows=batch_size, length=q_length, device=device)
        if offsets is not None:
            return offsets
    words = dict(kwargs) if mask_function is None else {**kwargs, "mask_function": mask_function}
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **words,
    )
    return mask


class _Around(threading.local):
    """What this thread enters for each call of attention without dropout."""

    context: AbstractContextManager[Any] | None = None


_AROUND = _Around()


@contextmanager
def around_attention(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter `context` for each `packed_attention` without dropout that this thread calls inside."""
    before, _AROUND.context = _AROUND.context, context
    try:
        yield
    finally:
        _AROUND.context = before


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: [rows, heads, L, dim] -> [rows, L, heads, dim], as transformers'
    interface has it.

    Given document offsets as `attention_mask` no pair crosses a document; otherwise transformers'
    sdpa.
    """
    words = {**kwargs, "dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
    if dropout or _AROUND.context is None:
        return _attend(module, query, key, value, attention_mask, **words)
    with _AROUND.context:
        return _attend(module, query, key, value, attention_mask, **words)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """See `packed_attention`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if any(kwargs.get(word) is not None for word in ("softcap", "position_bias", "s_aux")):
        raise ValueError(
            "packed attention has no soft cap, position bias or sink: build it with eager attention"
        )
    rows, heads, length, _ = query.shape
    cuts = attention_mask[..., 0].flatten() if is_offsets(attention_mask) else None  # type: ignore[index]
    if cuts is not None and cuts.numel() == 1:
        attention_mask = cuts = None
        if sliding_window is not None and sliding_window < length:
            cuts = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
    if cuts is None:
        words = (
            dict(kwargs) if sliding_window is None else {**kwargs, "sliding_window": sliding_window}
        )
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **words
        )
        return output
    longest = length if attention_mask is None else attention_mask.shape[-1]

    def flat(x: Tensor) -> Tensor:
        """[rows, heads, L, dim] -> [rows * L, heads, dim]."""
        return x.transpose(1, 2).reshape(rows * length, x.shape[1], x.shape[3])

    q, k, v = flat(query), flat(key), flat(value)
    flat_out = document_attention(
        q,
        k,
        v,
        cuts,
        longest=longest,
        scale=scaling,
        window=sliding_window,
        dropout=dropout,
    )
    return flat_out.view(rows, length, heads, v.shape[-1]), None


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each document: q, k [tokens, heads, dim], v [tokens, heads, dim_v] ->
    [tokens, heads of q, dim_v]. k and v may have fewer heads, each for a group of q's.

    offsets: int32 [documents + 1]. longest: tokens of the longest document, or a bound on them; it
    only sizes the kernel's launch. window: a token sees itself and the window - 1 before it.
    """
    group = q.shape[1] // k.shape[1]
    fast = not dropout and has_varlen_kernel(q, v)
    in_groups = group > 1 and fast and _kernel_takes_groups()
    if group > 1 and not in_groups:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if fast:
        from torch.nn.attention.varlen import varlen_attn

        words: dict[str, Any] = {"enable_gqa": True} if in_groups else {}
        cuts = offsets.contiguous()
        left = -1 if window is None else window - 1
        out = varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(), cuts, cuts, longest, longest,
            scale=scale, window_size=(left, 0), **words,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out
    return torch.cat(
        [
            _one_document(q[begin:end], k[begin:end], v[begin:end], scale, window, dropout)
            for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            if begin < end
        ]
    )


def has_varlen_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether torch's variable-length kernel takes these: CUDA, half precision, one head dim of at
    most 256.
    """
    dim = q.shape[-1]
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and dim == v.shape[-1] and dim % 8 == 0 and dim <= FLASH_MAX_HEAD_DIM


@cache
def _kernel_takes_groups() -> bool:
    """Whether torch's kernel reads each key head once for its group of query heads; otherwise they
    are copied."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _one_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    length = q.shape[0]
    band = None
    if window is not None and length > window:
        here = torch.arange(length, device=q.device)
        distance = here[:, None] - here[None, :]
        band = (distance >= 0) & (distance < window)
    out = nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1),
        attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scale,
    )  # fmt: skip
    return out.transpose(0, 1)
