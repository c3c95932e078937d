"""Fast twins of `numerics/formats.py`, chosen explicitly.

A provider is a function with the signature of `numerics.formats.unpack`; the eager one is the truth
that the others are tested against. "auto" takes the fastest that is present and legal:

    CUDA   Triton, then bitsandbytes, then eager
    CPU    bitsandbytes (its AVX-512 loops, nf4 and fp4 only), then eager

A choice made by name is never replaced by another: it works or is refused. Providers are imported
when they are selected, because importing bitsandbytes takes seconds and Triton needs a GPU.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch

from nibble.errors import ConfigError, PlacementError
from nibble.numerics.formats import CODECS, Matmul, Unpack, unpack
from nibble.spec.formats import FormatSpec

Choice = Literal["auto", "eager", "triton", "bitsandbytes"]

TRITON_MODULES = {"nf4": "nf4", "fp4": "nf4", "int8": "int8", "hqq": "hqq", "ternary": "ternary"}
BITSANDBYTES_FORMATS = ("nf4", "fp4")
BITSANDBYTES_MIN_BLOCK = 32


def select(spec: FormatSpec, *, device: torch.device | str, choice: Choice = "auto") -> Unpack:
    """The function that unpacks `spec` on `device`: call it as `unpack(spec, tensors, shape=,
    dtype=)`.

    Raises ConfigError if the chosen provider is not installed or does not serve the format, and
    PlacementError if it does not run on the device.
    """
    kind = torch.device(device).type
    if choice == "auto":
        choice = _fastest(spec, kind)
    if choice == "eager":
        return unpack
    if choice == "triton":
        _require_triton(kind)
        return _triton_unpack(spec)
    _require_bitsandbytes(spec, kind)
    from nibble.kernels import bitsandbytes

    return bitsandbytes.provider()


def select_matmul(
    spec: FormatSpec, *, device: torch.device | str, choice: Choice = "auto"
) -> Matmul | None:
    """The format's own product on `device`, or None where one multiplies by the dense weight.

    Only int8 has one: LLM.int8's mixed product. Errors are those of `select`; bitsandbytes offers
    none.
    """
    eager = CODECS[spec.name].matmul
    if eager is None:
        return None
    kind = torch.device(device).type
    if choice == "auto":
        choice = "triton" if kind == "cuda" and _has("triton") else "eager"
    if choice == "eager":
        return eager
    if choice == "bitsandbytes":
        _require_bitsandbytes(spec, kind)
    _require_triton(kind)
    from nibble.kernels import int8

    return int8.matmul


def _fastest(spec: FormatSpec, kind: str) -> Choice:
    if kind == "cuda" and _has("triton"):
        return "triton"
    if kind in ("cpu", "cuda") and _bitsandbytes_serves(spec) and _has("bitsandbytes"):
        return "bitsandbytes"
    return "eager"


def _triton_unpack(spec: FormatSpec) -> Unpack:
    module = import_module(f"nibble.kernels.{TRITON_MODULES[spec.name]}")
    twin: Unpack = module.unpack
    return twin


def _require_triton(kind: str) -> None:
    if not _has("triton"):
        raise ConfigError(
            "quant.kernels=triton, but triton is not installed; it comes with torch for CUDA on "
            "Linux (pip install triton), or use kernels=auto"
        )
    if kind != "cuda":
        raise PlacementError(
            f"quant.kernels=triton needs a CUDA device, not {kind}; use kernels=auto or eager"
        )


def _require_bitsandbytes(spec: FormatSpec, kind: str) -> None:
    if not _bitsandbytes_serves(spec):
        raise ConfigError(
            f"quant.kernels=bitsandbytes does not serve {_words(spec)}; it serves nf4 and fp4 in "
            f"blocks of {BITSANDBYTES_MIN_BLOCK} or more: use kernels=auto"
        )
    if not _has("bitsandbytes"):
        raise ConfigError(
            "quant.kernels=bitsandbytes, but bitsandbytes is not installed; "
            'pip install "nibble[kernels]", or use kernels=auto'
        )
    if kind not in ("cpu", "cuda"):
        raise PlacementError(
            f"quant.kernels=bitsandbytes runs on cpu and cuda, not {kind}; use kernels=eager"
        )


def _bitsandbytes_serves(spec: FormatSpec) -> bool:
    return spec.name in BITSANDBYTES_FORMATS and spec.block >= BITSANDBYTES_MIN_BLOCK


def _words(spec: FormatSpec) -> str:
    width = f" at {spec.bits} bits" if spec.name == "hqq" else ""
    return f"{spec.name}{width}" + (f" in blocks of {spec.block}" if spec.block else "")


def _has(package: str) -> bool:
    return find_spec(package) is not None
