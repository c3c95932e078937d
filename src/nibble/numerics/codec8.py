"""Block-wise 8-bit codec of optimiser state.

Each 256 consecutive elements of the flattened tensor share their largest magnitude, and
x / absmax is stored as the index of the nearest of 256 fixed values:

    absmax[b] = max |x_i|, i in block b        codes[i] = argmin_c |map[c] - x_i / absmax[b]|

The maps are "dynamic": seven decades, and the larger the decade, the more of the codes it gets. So
values near absmax are fine-grained and 1e-7 of it is still above 0. Source: Dettmers et al., 8-bit
Optimizers via Block-wise Quantization, arXiv 2110.02861. The maps are bitsandbytes' own, value
for value.

Costs 1 byte and 4/256 byte an element. One deliberate difference from bitsandbytes: in the unsigned
map a positive value never becomes 0. A second moment of 0 beside a first moment that is not 0
divides by eps alone, and the element jumps; here it is held at the smallest code, 3.25e-7 of
absmax. It is not a weight format (those are `formats.py`). A block with a NaN decodes to NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nibble.spec.state import BLOCK

NUM_EXPONENTS = 7
# An all-zero block has absmax 0; dividing by this keeps 0 / 0 away and changes no other block.
_SMALLEST = torch.finfo(torch.float32).tiny


@lru_cache(maxsize=2)
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values that codes stand for, ascending, float32 on the CPU; do not write into it.

    Decade e in 0..6 holds 2^e (signed) or 2^(e+1) (unsigned) midpoints of an even split of
    [0.1, 1] * 10^(e-6); signed maps mirror them; 0 and 1 complete the 256.
    """
    values = [0.0, 1.0]
    for exponent in range(NUM_EXPONENTS):
        num_values = 2 ** (exponent if signed else exponent + 1)
        edges = torch.linspace(0.1, 1, num_values + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (exponent - NUM_EXPONENTS + 1)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def zero_code(*, signed: bool) -> int:
    """The code of 0: what padding and fresh states are filled with."""
    return 127 if signed else 0


@lru_cache(maxsize=32)
def tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map and the 255 edges between its codes, on `device`; do not write into them."""
    values = dynamic_map(signed)
    edges = (values[:-1] + values[1:]) / 2
    if not signed:
        edges[0] = 0.0  # whatever is above 0 gets code 1 at least (module docstring)
    return values.to(device), edges.to(device)


def encode_blocks(
    blocks: Tensor, *, signed: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and absmax float32 of whole blocks, float32 [num_blocks, 256].

    With a `generator` a value goes to one of its two neighbours at random, without bias.
    """
    absmax = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=-1)
    scaled = blocks / absmax.clamp(min=_SMALLEST).unsqueeze(-1)
    values, edges = tables(signed, blocks.device)
    if generator is None:
        return _nearest(scaled, edges, signed=signed).to(torch.uint8), absmax
    below = torch.bucketize(scaled, values, out_int32=True, right=True).sub_(1).clamp_(0, 254)
    low, high = values[below], values[below + 1]
    chance = torch.rand(blocks.shape, generator=generator, device=blocks.device)
    codes = below + (chance < (scaled - low) / (high - low))
    if not signed:
        codes = torch.maximum(codes, (scaled > 0).to(codes.dtype))
    return codes.to(torch.uint8), absmax


def _nearest(scaled: Tensor, edges: Tensor, *, signed: bool) -> Tensor:
    """Index int32 of the code nearest to each value in [-1, 1], searched as the device likes."""
    if scaled.device.type != "cpu":
        return torch.bucketize(scaled, edges, out_int32=True)
    # A CPU mispredicts every branch of that search. The upper 16 bits of a float32 leave one or two
    # candidates, so a table of the lower one and one comparison give the same code 4 times faster.
    first, upper_edges = _first_codes(signed)
    flat = scaled.reshape(-1)
    bits = flat.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    codes = first.index_select(0, bits)
    codes += flat > upper_edges.index_select(0, codes)
    return codes.view(scaled.shape)


@lru_cache(maxsize=2)
def _first_codes(signed: bool) -> tuple[Tensor, Tensor]:
    """Code of the least float32 of given upper 16 bits [65536]; upper edge of each code [256]."""
    _, edges = tables(signed, torch.device("cpu"))
    upper = torch.arange(1 << 16, dtype=torch.int64, device="cpu")
    least = (upper << 16) | torch.where(upper >= 1 << 15, 0xFFFF, 0)  # negative: most magnitude
    values = least.to(torch.int32).view(torch.float32)
    last = torch.full((1,), float("inf"), device="cpu")
    return torch.bucketize(values, edges, out_int32=True), torch.cat([edges, last])


def decode_blocks(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Values float32 [num_blocks, 256] of codes uint8 [num_blocks, 256] and absmax [num_blocks]."""
    values, _ = tables(signed, codes.device)
    decoded = torch.index_select(values, 0, codes.reshape(-1).int())
    return decoded.view(codes.shape).mul_(absmax.unsqueeze(-1))


def encode(
    x: Tensor, *, signed: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of `x`) and absmax (float32 [ceil(numel / 256)]) of any tensor.

    The last block may be shorter. Deterministic to nearest, or at random with a `generator` on the
    tensor's device. `signed=False` expects values >= 0.
    """
    flat = x.detach().reshape(-1).float()
    codes, absmax = encode_blocks(_whole_blocks(flat, 0.0), signed=signed, generator=generator)
    return codes.reshape(-1)[: x.numel()].reshape(x.shape), absmax


def decode(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Values float32, the shape of `codes`: the inverse of `encode` up to rounding."""
    blocks = _whole_blocks(codes.reshape(-1), zero_code(signed=signed))
    values = decode_blocks(blocks, absmax, signed=signed).reshape(-1)
    return values[: codes.numel()].view(codes.shape)


def _whole_blocks(flat: Tensor, value: float) -> Tensor:
    """`flat` as [num_blocks, 256], its tail filled up with `value`."""
    return torch.constant_pad_nd(flat, (0, -flat.numel() % BLOCK), value).view(-1, BLOCK)
