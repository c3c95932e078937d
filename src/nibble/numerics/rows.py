"""Walking a weight by rows: chunks that stay in cache, and rows padded to whole blocks.

Every format treats each row by itself, so work on a chunk of rows gives the same bits as work on
all of them. On a CPU a chunk is sized to stay in the second-level cache (elementwise chains then
run several times faster than over the whole matrix); on a GPU it bounds the memory of intermediates
to a few times 64 MiB, whatever the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 1 << 17
GPU_CHUNK_ELEMENTS = 1 << 24


def row_chunks(shape: tuple[int, int], device: torch.device) -> Iterator[slice]:
    """Slices of rows that cover a matrix of `shape` (rows, columns), none larger than a chunk."""
    rows, columns = shape
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def padded_fp32(rows: Tensor, length: int) -> Tensor:
    """A float32 copy of `rows` [n, in] with zeros up to `length` columns."""
    if rows.shape[1] == length:
        # A transposed weight (GPT-2 stores them so) keeps its strides through `to`.
        return rows.to(torch.float32).contiguous()
    padded = torch.zeros(rows.shape[0], length, dtype=torch.float32, device=rows.device)
    padded[:, : rows.shape[1]] = rows
    return padded
