"""GGUF files (llama.cpp): block-quantised weights, dequantised tensor by tensor to fp32.

The gguf package knows the block formats (Q4_0, Q4_1, Q8_0, the K-quants, F16,
BF16, F32, ...); transformers knows which tensor is which parameter and what llama.cpp changed on
the way (for Llama the rows of the query and key projections are in another rotary order, for Gemma
one is added to norms). Data are read with plain reads and dequantised a few rows at a time, so the
peak is one fp32 tensor. The values are what llama.cpp computes with; the original 16-bit weights
are lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import ConfigError, WeightError
from nibble.nn.quant import PackedWeight
from nibble.spec.formats import FormatSpec
from nibble.spec.gguf import read_gguf_header
from nibble.weights.source import Entry, Source, cut

CHUNK_BYTES = 16 * 2**20
MAX_PREFIX_WORDS = 2
COMPUTED = ("rope_freqs.weight",)
"""Rotary factors: they are part of the configuration, which has them already."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One tensor of the file: where it lies and how it is quantised."""

    name: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    kind: Any


class GgufSource:
    """A GGUF file under its own names; `bind` gives it the names of a model."""

    native = True
    packed_spec: FormatSpec | None = None

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ConfigError without the gguf package, WeightError for a damaged
        file."""
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError:
            raise ConfigError(
                'a .gguf file needs the gguf package: pip install "nibble[gguf]"'
            ) from None
        self._path = path
        header = read_gguf_header(path)
        self._architecture = str(header.values.get("general.architecture", ""))
        self._blocks = {}
        for tensor in header.tensors:
            try:
                kind = GGMLQuantizationType(tensor.type_id)
            except ValueError:
                raise WeightError(
                    f"{path}: {tensor.name} is of ggml's type {tensor.type_id}, unknown to this "
                    "gguf "
                    "package: upgrade it"
                ) from None
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            block = Block(
                name=tensor.name,
                offset=tensor.offset,
                num_bytes=math.prod(tensor.shape) // per_block * block_bytes,
                shape=tensor.shape,
                kind=kind,
            )
            if block.offset + block.num_bytes > header.num_bytes:
                raise WeightError(
                    f"{path} is no whole GGUF file ({tensor.name} lies beyond its end): fetch "
                    "it again"
                )
            self._blocks[tensor.name] = block

    def entries(self) -> Mapping[str, Entry]:
        """All tensors by llama.cpp's names."""
        return {n: Entry(shape=b.shape, dtype=torch.float32) for n, b in self._blocks.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """Dequantise one tensor to fp32, as it stands in the file."""
        return cut(read_block(self._path, self._blocks[name]), rows)

    def bind(self, model: nn.Module) -> Source:
        """This file under the parameter names of `model`, with llama.cpp's changes undone."""
        return BoundGguf(self._path, self._blocks, self._architecture, model)

    def describe(self) -> str:
        """The file."""
        return str(self._path)


class BoundGguf:
    """A GGUF file whose tensors are named and shaped as a model's parameters."""

    native = True
    packed_spec: FormatSpec | None = None

    def __init__(
        self, path: Path, blocks: Mapping[str, Block], architecture: str, model: nn.Module
    ) -> None:
        """Map names through transformers. Raises WeightError for an architecture that it cannot
        map."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._path = path
        self._expected = model.state_dict()
        config: Any = model.config
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
            config=config.to_dict()
        )
        names = _name_map(path, architecture, self._processor, model)
        self._pieces: dict[str, list[Block]] = {}
        unnamed = []
        for name, block in blocks.items():
            # Merged experts are named without a suffix in transformers.
            target = names.get(name) or names.get(name.removesuffix(".weight"))
            if name == "output.weight" and "lm_head.weight" in self._expected:
                target = "lm_head.weight"
            if target is not None:
                self._pieces.setdefault(target, []).append(block)
            elif name not in COMPUTED:
                unnamed.append(name)
        if unnamed:
            raise WeightError(
                f"{path} holds {len(unnamed)} tensors that {type(model).__name__} does not "
                "have, such as "
                f"{unnamed[0]}: take the safetensors model"
            )
        for pieces in self._pieces.values():
            # The gate comes before the up projection in a merged parameter.
            pieces.sort(key=lambda block: ("_gate_" not in block.name, block.name))

    def entries(self) -> Mapping[str, Entry]:
        """All tensors by the model's names."""
        return {name: Entry(shape=self._shape(name), dtype=torch.float32) for name in self._pieces}

    def read(self, name: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """Dequantise one parameter to fp32."""
        parts = [self._original(block, name) for block in self._pieces[name]]
        return cut(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), rows)

    def bind(self, model: nn.Module) -> Source:
        """Itself."""
        return self

    def describe(self) -> str:
        """The file."""
        return str(self._path)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` returns: transposed and expanded tensors are known by their number
        of elements."""
        pieces = self._pieces[name]
        if len(pieces) > 1:
            first = pieces[0].shape
            return (first[0], sum(block.shape[1] for block in pieces), *first[2:])
        shape, wanted = pieces[0].shape, tuple(self._expected[name].shape)
        if self._is_conv1d(pieces[0].name):
            # The processor turns llama.cpp's [out, in] into the layout of a checkpoint.
            return shape[::-1]
        squeezed = tuple(size for size in wanted if size != 1)
        return wanted if shape == squeezed and len(shape) < len(wanted) else shape

    def _is_conv1d(self, gguf_name: str) -> bool:
        return type(self._processor).__name__ == "GPT2TensorProcessor" and gguf_name.endswith(
            ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
        )

    def _original(self, block: Block, name: str) -> Tensor:
        value = read_block(self._path, block)
        if block.name == "output.weight" or "_exps" in block.name:
            # The processors would store these in a dictionary of their own; both are unchanged by
            # llama.cpp.
            return value
        made = self._processor.process(weights=value.numpy(), name=block.name)
        result = torch.from_numpy(made.weights)
        return result.reshape(self._shape(name))


def _name_map(path: Path, architecture: str, processor: Any, model: nn.Module) -> dict[str, str]:
    """llama.cpp's name of each parameter, as the gguf package and transformers' processors know it.

    Files may be converted from the inner model, whose names lack a prefix: names are tried whole
    first, then without their first words.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((key for key, value in MODEL_ARCH_NAMES.items() if value == architecture), None)
    config: Any = model.config
    if arch is None:
        raise WeightError(
            f"{path} is of the architecture {architecture!r}, unknown to this gguf package: "
            "upgrade "
            "it or take the safetensors model"
        )
    table = get_tensor_name_map(arch, config.get_text_config().num_hidden_layers)
    names: dict[str, str] = {}
    for depth in range(MAX_PREFIX_WORDS + 1):
        for full_name in model.state_dict():
            words = full_name.split(".")
            prefix = "".join(f"{word}." for word in words[:depth])
            name = processor.preprocess_name(".".join(words[depth:]))
            stem, dot, suffix = name.rpartition(".")
            if suffix not in ("weight", "bias"):
                stem, dot, suffix = name, "", ""
            found = table.get_name(stem)
            if found is None:
                extra: dict[str, str] = {}
                processor.perform_fallback_tensor_mapping(extra, dot + suffix, prefix, name)
                for key, value in extra.items():
                    names.setdefault(key, value)
            else:
                names.setdefault(found + dot + suffix, full_name)
    return names


def read_block(path: Path, block: Block) -> Tensor:
    """Dequantise a tensor to fp32, rows at a time; WeightError when the file ends early or the
    format is unknown."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, dequantize

    rows = math.prod(block.shape[:-1])
    block_values, block_bytes = GGML_QUANT_SIZES[block.kind]
    row_bytes = block.shape[-1] // block_values * block_bytes if block.shape else 0
    if rows * row_bytes != block.num_bytes:
        raise WeightError(f"{path}: {block.name} is not whole rows of {block.kind.name}")
    result = torch.empty(rows, block.shape[-1], dtype=torch.float32)
    step = max(1, CHUNK_BYTES // (4 * block.shape[-1]))
    with path.open("rb", buffering=0) as file:
        file.seek(block.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw = np.empty(count * row_bytes, dtype=np.uint8)
            if file.readinto(raw.data) != raw.nbytes:
                raise WeightError(f"{path} ended while {block.name} was read: fetch it again")
            try:
                values = dequantize(raw.reshape(count, row_bytes), block.kind)
            except NotImplementedError:
                raise WeightError(
                    f"{path}: {block.name} is {block.kind.name}, which the gguf package does "
                    "not dequantise"
                ) from None
            result[start : start + count] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return result.reshape(block.shape)
