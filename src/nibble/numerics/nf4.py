"""4-bit codes with block-wise absolute maxima: NF4 (QLoRA) and FP4, with optionally quantised
scales.

    s = max |w| over a block;  c = argmin_i |q_i - w/s|;  w ~ s q_c

NF4's q are quantiles of a normal distribution with an exact zero (Dettmers et al., QLoRA, arXiv
2305.14314, appendix E); FP4's are a sign, two exponent bits and one mantissa bit. Tables,
thresholds (midpoints in fp32, ties to the lower value) and byte order (first value in the high
nibble) are those of bitsandbytes: codes and values are equal to its bit for bit.

Double quantisation (QLoRA section 3) is our own, because theirs runs across rows: the square roots
of up to 256 scales of one row are stored in 8 bits on an even grid from their minimum to their
maximum,

    s ~ (offset + step c)^2,    offset = min sqrt(s),  step = (max sqrt(s) - min sqrt(s)) / 255

The root makes the grid finer for small scales, so one outlier block in a row costs the others
little; no table is needed to decode. The error of a scale is below that of bitsandbytes' nested
scales on normal and on heavy-tailed weights (tests).

Costs: packing makes a few float32 copies of a chunk of rows; unpacking is one gather of pairs from
a table of 256, then one product. Not a matrix product: a weight is made dense, used and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nibble.numerics.rows import padded_fp32, row_chunks
from nibble.spec.formats import SCALES_PER_STEP, FormatSpec

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""FP4's magnitudes times 12, by the low three bits of a code; the fourth bit is the sign."""
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
"""FP4's codes from the lowest value up; what rounds to zero is 0, or 8 if it was positive."""
MIN_ABSMAX = 1e-38


def code_values(name: str, device: torch.device) -> Tensor:
    """The 16 values that the codes of "nf4" or "fp4" stand for, float32 [16]."""
    if name == "nf4":
        return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)
    magnitudes = torch.tensor(FP4_TWELFTHS, dtype=torch.float32, device=device) / 12
    return torch.cat((magnitudes, -magnitudes))


def pack(spec: FormatSpec, weight: Tensor) -> dict[str, Tensor]:
    """Quantise `weight` [out, in] to the tensors of `spec`: codes, scales and what codes scales."""
    out, in_features = weight.shape
    shapes = {name: s.shape for name, s in spec.tensors((out, in_features)).items()}
    length = spec.padded(in_features)
    codes = torch.empty(shapes["codes"], dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out, length // spec.block, dtype=torch.float32, device=weight.device)
    values = code_values(spec.name, weight.device)
    order = torch.argsort(values) if spec.name == "nf4" else torch.tensor(FP4_ORDER)
    order = order.to(weight.device)
    ordered = values[order]
    thresholds = (ordered[:-1] + ordered[1:]) / 2
    table = order.to(torch.uint8)
    for rows in row_chunks((out, length), weight.device):
        blocks = padded_fp32(weight[rows], length).view(-1, length // spec.block, spec.block)
        absmax = blocks.abs().amax(dim=2)
        # A product with the reciprocal, no division: bitsandbytes' rounding, which decides ties.
        inverse = absmax.clamp(min=MIN_ABSMAX).reciprocal_().unsqueeze(2)
        ranks = torch.bucketize((blocks * inverse).clamp_(-1, 1), thresholds, out_int32=True)
        nibbles = (
            table[ranks].flatten(1) if spec.name == "fp4" else ranks.to(torch.uint8).flatten(1)
        )
        codes[rows] = (nibbles[:, 0::2] << 4) | nibbles[:, 1::2]
        scales[rows] = absmax
    if not spec.double_quant:
        return {"codes": codes, "scales": scales}
    return {"codes": codes, **compress_scales(scales)}


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The dense weight of `shape` (rows, in), in `dtype`; `tensors` may be any slice of rows."""
    codes = tensors["codes"]
    length = spec.padded(shape[1])
    scales = block_scales(spec, tensors, in_features=shape[1])
    values = code_values(spec.name, codes.device)
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)
    dense = torch.empty(shape, dtype=dtype, device=codes.device)
    for rows in row_chunks((shape[0], length), codes.device):
        found = pairs.index_select(0, codes[rows].flatten().to(torch.int32))
        blocks = found.view(-1, length // spec.block, spec.block)
        blocks *= scales[rows].unsqueeze(2)
        dense[rows] = blocks.flatten(1)[:, : shape[1]]
    return dense


def block_scales(spec: FormatSpec, tensors: Mapping[str, Tensor], *, in_features: int) -> Tensor:
    """The float32 scales [rows, blocks] of packed `tensors`, decoded if they are in 8 bits."""
    if not spec.double_quant:
        return tensors["scales"]
    return expand_scales(tensors, num_blocks=spec.padded(in_features) // spec.block)


def compress_scales(scales: Tensor) -> dict[str, Tensor]:
    """Store non-negative float32 `scales` [rows, n] in 8 bits; see the module's equation.

    Returns `scales` uint8 [rows, n rounded up to even], `scale_steps` and `scale_offsets` float32
    [rows, ceil(n/256)].
    """
    rows, num_blocks = scales.shape
    groups = [scales[:, i : i + SCALES_PER_STEP] for i in range(0, num_blocks, SCALES_PER_STEP)]
    codes = torch.zeros(rows, num_blocks + num_blocks % 2, dtype=torch.uint8, device=scales.device)
    steps, offsets = [], []
    for index, group in enumerate(groups):
        roots = group.sqrt()
        low, high = roots.aminmax(dim=1, keepdim=True)
        step = (high - low) / 255
        # A step of zero means that all scales are equal: every code is then 0.
        inverse = torch.where(step > 0, 1 / step, 0)
        start = index * SCALES_PER_STEP
        codes[:, start : start + group.shape[1]] = (
            ((roots - low) * inverse).round_().clamp_(0, 255).to(torch.uint8)
        )
        steps.append(step)
        offsets.append(low)
    return {
        "scales": codes,
        "scale_steps": torch.cat(steps, dim=1),
        "scale_offsets": torch.cat(offsets, dim=1),
    }


def expand_scales(tensors: Mapping[str, Tensor], *, num_blocks: int) -> Tensor:
    """The float32 scales [rows, num_blocks] that `compress_scales` stored."""
    roots = tensors["scales"][:, :num_blocks].to(torch.float32)
    for index in range(tensors["scale_steps"].shape[1]):
        group = roots[:, index * SCALES_PER_STEP : (index + 1) * SCALES_PER_STEP]
        group *= tensors["scale_steps"][:, index : index + 1]
        group += tensors["scale_offsets"][:, index : index + 1]
    return roots.square_()
