"""Causal attention with a bias for each key in Triton, forward and backward, scores never stored.

Flash attention (Dao 2023, arXiv 2307.08691) with two loads more a tile of keys: the head's biases,
and the row's padding where there is any. Query, key and value are read where the projection wrote
them and their gradients written the same way, so that no copy is made around it. Backward is two
kernels without atomics, thus the same bits every time: one for each tile of queries (which also
makes g . o), then one for each tile of keys. Tiles above the diagonal are never visited.
"""

# Triton's kernels are programs of their own language, and its decorator has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.launch import launch
from nibble.numerics.alibi_attention import LEAST_BIAS

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(LEAST_BIAS)


class Tile(NamedTuple):
    """How a kernel cuts its work. The larger of queries and keys is a multiple of the other."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


FORWARD, BY_QUERY, BY_KEY = Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 3)
SMALL = Tile(32, 32, 4, 2)
"""For heads wider than 128, and for types of 32 bits."""


@triton.jit
def _rows(at, token, by_token, num_tokens, CHECKED: tl.constexpr, DIM: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    """Heads' vectors [tokens, WIDTH] of a query, key or value; zeros behind the last one."""
    column = tl.arange(0, WIDTH)
    here = at + token.to(tl.int64)[:, None] * by_token + column[None, :]
    if CHECKED:
        return tl.load(
            here, mask=(token < num_tokens)[:, None] & (column < DIM)[None, :], other=0.0
        )
    if DIM < WIDTH:
        return tl.load(here, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(here)


@triton.jit
def _keys_bias(bias, padding, key, num_tokens, PADDED: tl.constexpr):
    """Added to the scores of these keys, times log2 e."""
    inside = key < num_tokens
    value = tl.load(bias + key, mask=inside, other=0.0).to(tl.float32)
    if PADDED:
        value += tl.load(padding + key, mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(value, LEAST) * LOG2_E


@triton.jit
def _attend(
    total, most, share, q, k_at, v_at, bias, padding, begin, query, num_tokens, by_token, scale,
    DIAGONAL: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running sums of values, maxima and sums of shares."""
    key = begin + tl.arange(0, KEYS)
    k = _rows(k_at, key, by_token, num_tokens, DIAGONAL, DIM, WIDTH)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores += _keys_bias(bias, padding, key, num_tokens, PADDED)[None, :]
    if DIAGONAL:
        scores = tl.where(key[None, :] <= query[:, None], scores, float("-inf"))
    now = tl.maximum(most, tl.max(scores, axis=1))
    shares = tl.exp2(scores - now[:, None])
    fade = tl.exp2(most - now)
    share = share * fade + tl.sum(shares, axis=1)
    v = _rows(v_at, key, by_token, num_tokens, DIAGONAL, DIM, WIDTH)
    total = total * fade[:, None]
    total = tl.dot(shares.to(v.dtype), v, total, input_precision="ieee")
    return total, now, share


@triton.jit
def _forward_kernel(
    qkv, bias, padding, out, sums,
    num_tokens, num_heads, scale, by_row, by_token, by_head, by_part, bias_row, bias_head,
    padding_row,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    q_at = qkv + row * by_row + head * by_head
    k_at, v_at = q_at + by_part, q_at + 2 * by_part
    bias += row * bias_row + head * bias_head
    padding += row * padding_row
    first = tile * QUERIES
    query = first + tl.arange(0, QUERIES)
    q = _rows(q_at, query, by_token, num_tokens, True, DIM, WIDTH)
    total = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    most = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
    share = tl.zeros([QUERIES], dtype=tl.float32)
    for begin in range(0, first, KEYS):
        total, most, share = _attend(
            total, most, share, q, k_at, v_at, bias, padding, begin, query, num_tokens, by_token,
            scale, False, PADDED, DIM, WIDTH, KEYS,
        )  # fmt: skip
    for begin in range(first, first + QUERIES, KEYS):
        total, most, share = _attend(
            total, most, share, q, k_at, v_at, bias, padding, begin, query, num_tokens, by_token,
            scale, True, PADDED, DIM, WIDTH, KEYS,
        )  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = query < num_tokens
    at = ((row * num_tokens + query) * num_heads + head)[:, None] * DIM + column[None, :]
    value = total / share[:, None]
    tl.store(
        out + at, value.to(out.dtype.element_ty), mask=inside[:, None] & (column < DIM)[None, :]
    )
    at = (row * num_heads + head) * num_tokens + query
    tl.store(sums + at, (most + tl.log2(share)) / LOG2_E, mask=inside)


@triton.jit
def _by_query_step(
    by_q, q, by_out, along, top, k_at, v_at, bias, padding, begin, query, num_tokens, by_token,
    scale, DIAGONAL: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    key = begin + tl.arange(0, KEYS)
    k = _rows(k_at, key, by_token, num_tokens, DIAGONAL, DIM, WIDTH)
    v = _rows(v_at, key, by_token, num_tokens, DIAGONAL, DIM, WIDTH)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores += _keys_bias(bias, padding, key, num_tokens, PADDED)[None, :]
    shares = tl.exp2(scores - top[:, None])
    if DIAGONAL:
        shares = tl.where(key[None, :] <= query[:, None], shares, 0.0)
    by_share = tl.dot(by_out, tl.trans(v), input_precision="ieee")
    by_scores = shares * (by_share - along[:, None])
    return tl.dot(by_scores.to(k.dtype), k, by_q, input_precision="ieee")


@triton.jit
def _by_query_kernel(
    qkv, bias, padding, grad, out, sums, grad_qkv, alongs,
    num_tokens, num_heads, scale, by_row, by_token, by_head, by_part, bias_row, bias_head,
    padding_row,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, and g . o of each."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    start = row * by_row + head * by_head
    q_at = qkv + start
    k_at, v_at = q_at + by_part, q_at + 2 * by_part
    bias += row * bias_row + head * bias_head
    padding += row * padding_row
    first = tile * QUERIES
    query = first + tl.arange(0, QUERIES)
    inside = query < num_tokens
    own = (row * num_tokens * num_heads + head) * DIM
    q = _rows(q_at, query, by_token, num_tokens, True, DIM, WIDTH)
    by_out = _rows(grad + own, query, num_heads * DIM, num_tokens, True, DIM, WIDTH)
    o = _rows(out + own, query, num_heads * DIM, num_tokens, True, DIM, WIDTH)
    along = tl.sum(by_out.to(tl.float32) * o.to(tl.float32), axis=1)
    at = (row * num_heads + head) * num_tokens + query
    tl.store(alongs + at, along, mask=inside)
    top = tl.load(sums + at, mask=inside, other=float("inf")) * LOG2_E
    by_q = tl.zeros([QUERIES, WIDTH], dtype=tl.float32)
    scale_2 = scale * LOG2_E
    for begin in range(0, first, KEYS):
        by_q = _by_query_step(
            by_q, q, by_out, along, top, k_at, v_at, bias, padding, begin, query, num_tokens,
            by_token, scale_2, False, PADDED, DIM, WIDTH, KEYS,
        )  # fmt: skip
    for begin in range(first, first + QUERIES, KEYS):
        by_q = _by_query_step(
            by_q, q, by_out, along, top, k_at, v_at, bias, padding, begin, query, num_tokens,
            by_token, scale_2, True, PADDED, DIM, WIDTH, KEYS,
        )  # fmt: skip
    column = tl.arange(0, WIDTH)
    here = grad_qkv + start + query.to(tl.int64)[:, None] * by_token + column[None, :]
    value = (by_q * scale).to(grad_qkv.dtype.element_ty)
    tl.store(here, value, mask=inside[:, None] & (column < DIM)[None, :])


@triton.jit
def _by_key_step(
    by_k, by_v, k, v, keys_bias, q_at, grad, sums, alongs, begin, key, num_tokens, num_heads,
    by_token, scale, DIAGONAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    query = begin + tl.arange(0, QUERIES)
    inside = query < num_tokens
    q = _rows(q_at, query, by_token, num_tokens, True, DIM, WIDTH)
    by_out = _rows(grad, query, num_heads * DIM, num_tokens, True, DIM, WIDTH)
    top = tl.load(sums + query, mask=inside, other=float("inf")) * LOG2_E
    along = tl.load(alongs + query, mask=inside, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + keys_bias[:, None]
    shares = tl.exp2(scores - top[None, :])
    if DIAGONAL:
        shares = tl.where(key[:, None] <= query[None, :], shares, 0.0)
    by_v = tl.dot(shares.to(by_out.dtype), by_out, by_v, input_precision="ieee")
    by_share = tl.dot(v, tl.trans(by_out), input_precision="ieee")
    by_scores = shares * (by_share - along[None, :])
    by_k = tl.dot(by_scores.to(q.dtype), q, by_k, input_precision="ieee")
    return by_k, by_v


@triton.jit
def _by_key_kernel(
    qkv, bias, padding, grad, sums, grad_qkv, alongs,
    num_tokens, num_heads, scale, by_row, by_token, by_head, by_part, bias_row, bias_head,
    padding_row,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values."""
    first = tl.program_id(0) * KEYS
    row = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    start = row * by_row + head * by_head
    key = first + tl.arange(0, KEYS)
    k = _rows(qkv + start + by_part, key, by_token, num_tokens, True, DIM, WIDTH)
    v = _rows(qkv + start + 2 * by_part, key, by_token, num_tokens, True, DIM, WIDTH)
    bias += row * bias_row + head * bias_head
    keys_bias = _keys_bias(bias, padding + row * padding_row, key, num_tokens, PADDED)
    grad += (row * num_tokens * num_heads + head) * DIM
    at = (row * num_heads + head) * num_tokens
    by_k = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    by_v = tl.zeros([KEYS, WIDTH], dtype=tl.float32)
    scale_2 = scale * LOG2_E
    for begin in range(first, first + KEYS, QUERIES):
        by_k, by_v = _by_key_step(
            by_k, by_v, k, v, keys_bias, qkv + start, grad, sums + at, alongs + at, begin, key,
            num_tokens, num_heads, by_token, scale_2, True, DIM, WIDTH, QUERIES,
        )  # fmt: skip
    for begin in range(first + KEYS, num_tokens, QUERIES):
        by_k, by_v = _by_key_step(
            by_k, by_v, k, v, keys_bias, qkv + start, grad, sums + at, alongs + at, begin, key,
            num_tokens, num_heads, by_token, scale_2, False, DIM, WIDTH, QUERIES,
        )  # fmt: skip
    column = tl.arange(0, WIDTH)
    here = grad_qkv + start + key.to(tl.int64)[:, None] * by_token + column[None, :]
    inside = (key < num_tokens)[:, None] & (column < DIM)[None, :]
    tl.store(here + by_part, (by_k * scale).to(grad_qkv.dtype.element_ty), mask=inside)
    tl.store(here + 2 * by_part, by_v.to(grad_qkv.dtype.element_ty), mask=inside)


def alibi_attention(
    qkv: Tensor, bias: Tensor, padding: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Twin of `numerics.alibi_attention.alibi_attention`, on CUDA."""
    rows, tokens, heads, _, dim = qkv.shape
    out = torch.empty(rows, tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    sums = torch.empty(rows, heads, tokens, dtype=torch.float32, device=qkv.device)
    if out.numel():
        tile = _tile(qkv, FORWARD)
        launch(
            _forward_kernel,
            (triton.cdiv(tokens, tile.queries), rows * heads),
            (qkv, bias, bias if padding is None else padding, out, sums),
            *_numbers(qkv, bias, padding, scale * LOG2_E.value, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, sums


def alibi_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    sums: Tensor,
    bias: Tensor,
    padding: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """Twin of `numerics.alibi_attention.alibi_attention_backward`, on CUDA."""
    rows, tokens, heads, _, _ = qkv.shape
    grad, grad_qkv, alongs = grad.contiguous(), torch.empty_like(qkv), torch.empty_like(sums)
    assert grad_qkv.stride() == qkv.stride(), "query, key and value overlap or leave gaps"
    if grad.numel() == 0:
        return grad_qkv
    second = bias if padding is None else padding
    tile = _tile(qkv, BY_QUERY)
    launch(
        _by_query_kernel,
        (triton.cdiv(tokens, tile.queries), rows * heads),
        (qkv, bias, second, grad, out, sums, grad_qkv, alongs),
        *_numbers(qkv, bias, padding, scale, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    tile = _tile(qkv, BY_KEY)
    launch(
        _by_key_kernel,
        (triton.cdiv(tokens, tile.keys), rows * heads),
        (qkv, bias, second, grad, sums, grad_qkv, alongs),
        *_numbers(qkv, bias, padding, scale, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_qkv


def _tile(qkv: Tensor, tile: Tile) -> Tile:
    return tile if qkv.shape[-1] <= 128 and qkv.element_size() == 2 else SMALL


def _numbers(
    qkv: Tensor, bias: Tensor, padding: Tensor | None, scale: float, tile: Tile
) -> tuple[float, ...]:
    """What follows the tensors in each kernel."""
    dim = qkv.shape[-1]
    by_row, by_token, by_head, by_part, by_column = qkv.stride()
    assert by_column == 1 and bias.stride(-1) == 1, "a head's vector, and its biases, lie together"
    assert padding is None or padding.stride(-1) == 1, "a row's padding lies together"
    return (
        qkv.shape[1],
        qkv.shape[2],
        scale,
        by_row,
        by_token,
        by_head,
        by_part,
        bias.stride(0),
        bias.stride(1),
        0 if padding is None else padding.stride(0),
        padding is not None,
        dim,
        max(16, triton.next_power_of_2(dim)),
        tile.queries,
        tile.keys,
    )
