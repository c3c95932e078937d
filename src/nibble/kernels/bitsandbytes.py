"""bitsandbytes' 4-bit kernels on plain tensors.

Our nf4 and fp4 codes are byte for byte bitsandbytes' (rows of whole blocks, one after another), so
its registered operator `dequantize_4bit` reads them as they lie; only double-quantised scales are
decoded first, a tensor 64 times smaller than the weight. Its modules are not used: they lose the
quantisation state in state dicts and replicate scales when sharded.

Sources: bitsandbytes >= 0.50. On CPUs with AVX-512 it unpacks two to four times faster than eager.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping

import torch
from torch import Tensor

from nibble.errors import ConfigError
from nibble.numerics.formats import Unpack
from nibble.numerics.nf4 import block_scales
from nibble.spec.formats import FormatSpec


def provider() -> Unpack:
    """Import bitsandbytes, which registers its operators, and return `unpack`.

    What it prints on import (an optional package of its own that is absent) is dropped. Raises
    ConfigError if it cannot be imported.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"quant.kernels=bitsandbytes, but importing it failed ({error}); "
            'reinstall it with pip install "nibble[kernels]", or use kernels=eager'
        ) from error
    return unpack


def unpack(
    spec: FormatSpec, tensors: Mapping[str, Tensor], *, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Twin of `numerics.nf4.unpack`; `provider` must have been called before."""
    length = spec.padded(shape[1])
    scales = block_scales(spec, tensors, in_features=shape[1])
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        tensors["codes"].contiguous(),
        scales.contiguous().flatten(),
        spec.block,
        spec.name,
        [shape[0], length],
        dtype,
    )
    return dense if length == shape[1] else dense[:, : shape[1]].contiguous()
