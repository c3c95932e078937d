"""Checkpoints that bitsandbytes has quantised: nf4 and fp4 (with or without nested scales) and
int8.

bitsandbytes cuts the flattened weight into blocks of 64 with one absolute maximum each, two 4-bit
codes a byte, the first one high; nested scales are 8 bits again, in blocks of 256, with a table and
an offset. Where a row is a whole number of blocks the same bytes are a packed weight of ours: codes
go over verbatim and the scales as fp32 (they are few), so nothing is quantised twice. Other rows
are dequantised. int8 (`SCB` holds the rows' maxima) is the same layout as ours. Only safetensors
are read, and bitsandbytes itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.spec.formats import DEFAULT_INT8_THRESHOLD, FormatSpec
from nibble.weights.source import Entry, Source, cut

STATE_SUFFIX = ".quant_state.bitsandbytes__"
COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True, kw_only=True)
class FourBit:
    """What the checkpoint says of one 4-bit weight. `shape` is (out, in) or any other."""

    name: str
    block: int
    shape: tuple[int, ...]
    nested_block: int
    nested_offset: float
    nested: bool


class BnbSource:
    """A view of a safetensors source in which companions are hidden and quantised weights are
    single entries."""

    native = False

    def __init__(self, source: Source, *, int8_threshold: float = DEFAULT_INT8_THRESHOLD) -> None:
        """Wrap `source`; reads the small state of each weight. Raises WeightError for a state that
        cannot be meant."""
        self._source = source
        self._four: dict[str, FourBit] = {}
        raw = source.entries()
        states = {n.partition(STATE_SUFFIX)[0]: n for n in raw if STATE_SUFFIX in n}
        for weight, state_name in states.items():
            self._four[weight] = _parse_state(source, state_name)
        self._eight = {f"{n.removesuffix('.SCB')}.weight" for n in raw if n.endswith(".SCB")} & set(
            raw
        )
        self.packed_spec = self._spec(int8_threshold)
        self._entries = self._visible(raw)

    @property
    def packed_names(self) -> frozenset[str]:
        """Checkpoint names that `read` returns packed."""
        return frozenset(name for name, entry in self._entries.items() if entry.packed)

    def entries(self) -> Mapping[str, Entry]:
        """All tensors by name, quantised ones with the shape of the dense weight."""
        return self._entries

    def read(self, name: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """A packed weight where the layout allows it, else a dense tensor (fp32 when
        dequantised)."""
        if name in self._four:
            return cut(self._read_four(name, self._four[name]), rows)
        if name in self._eight:
            return cut(self._read_eight(name), rows)
        return self._source.read(name, rows)

    def bind(self, model: nn.Module) -> Source:
        """Itself: names are a checkpoint's."""
        return self

    def describe(self) -> str:
        """The folder."""
        return self._source.describe()

    def _spec(self, int8_threshold: float) -> FormatSpec | None:
        kinds = {(state.name, state.block) for state in self._four.values()}
        if len(kinds) + bool(self._eight) > 1:
            raise WeightError(
                f"{self.describe()} mixes quantisations {sorted(kinds)}: nibble reads one "
                "format per checkpoint"
            )
        if self._eight:
            return FormatSpec(name="int8", bits=8, int8_threshold=int8_threshold)
        for name, block in kinds:
            return FormatSpec(name=name, bits=4, block=block)
        return None

    def _visible(self, raw: Mapping[str, Entry]) -> dict[str, Entry]:
        hidden = {f"{name}{suffix}" for name in self._four for suffix in COMPANIONS}
        for name in self._eight:
            hidden |= {name.removesuffix("weight") + suffix for suffix in ("SCB", "weight_format")}
        visible = {}
        for name, entry in raw.items():
            if name in hidden or STATE_SUFFIX in name:
                continue
            if name in self._four:
                state = self._four[name]
                packed = len(state.shape) == 2 and state.shape[1] % state.block == 0
                entry = Entry(shape=state.shape, dtype=torch.float32, packed=packed)
            elif name in self._eight:
                entry = Entry(shape=entry.shape, dtype=torch.float32, packed=True)
            visible[name] = entry
        return visible

    def _tensor(self, name: str) -> Tensor:
        value = self._source.read(name)
        assert isinstance(value, Tensor)
        return value

    def _read_four(self, name: str, state: FourBit) -> Tensor | PackedWeight:
        codes = self._tensor(name).reshape(-1)
        scales = self._scales(name, state)
        if codes.numel() != -(-prod(state.shape) // 2) or scales.numel() != -(
            -prod(state.shape) // state.block
        ):
            raise WeightError(
                f"{self.describe()}: {name} holds {codes.numel()} bytes and {scales.numel()} "
                "scales, which is "
                f"not {list(state.shape)} in {state.name}: fetch it again"
            )
        if self._entries[name].packed and self.packed_spec is not None:
            rows = state.shape[0]
            tensors = {"codes": codes.view(rows, -1), "scales": scales.view(rows, -1)}
            return PackedWeight(spec=self.packed_spec, tensors=tensors)
        table = self._tensor(f"{name}.quant_map").float()
        return _dequantise(codes, scales, table, state)

    def _scales(self, name: str, state: FourBit) -> Tensor:
        absmax = self._tensor(f"{name}.absmax")
        if not state.nested:
            return absmax.float()
        table = self._tensor(f"{name}.nested_quant_map").float()
        steps = self._tensor(f"{name}.nested_absmax").float()
        steps = steps.repeat_interleave(state.nested_block)[: absmax.numel()]
        return table[absmax.long()] * steps + state.nested_offset

    def _read_eight(self, name: str) -> Tensor | PackedWeight:
        codes = self._tensor(name)
        scales = self._tensor(f"{name.removesuffix('weight')}SCB").float().reshape(-1, 1)
        if codes.dtype != torch.int8 or scales.shape[0] != codes.shape[0]:
            raise WeightError(
                f"{self.describe()}: {name} is {codes.dtype} with {scales.shape[0]} scales, not "
                "int8 with "
                "one scale a row: fetch it again"
            )
        assert self.packed_spec is not None
        return PackedWeight(spec=self.packed_spec, tensors={"codes": codes, "scales": scales})


def _dequantise(codes: Tensor, scales: Tensor, table: Tensor, state: FourBit) -> Tensor:
    pairs = torch.stack((codes >> 4, codes & 15), dim=1).reshape(-1)
    count = prod(state.shape)
    values = table[pairs.long()]
    return (values[:count] * scales.repeat_interleave(state.block)[:count]).reshape(state.shape)


def _parse_state(source: Source, name: str) -> FourBit:
    value = source.read(name)
    assert isinstance(value, Tensor)
    try:
        state: dict[str, Any] = json.loads(bytes(value.tolist()))
        parsed = FourBit(
            name=str(state["quant_type"]),
            block=int(state["blocksize"]),
            shape=tuple(int(size) for size in state["shape"]),
            nested_block=int(state.get("nested_blocksize", 256)),
            nested_offset=float(state.get("nested_offset", 0.0)),
            nested="nested_blocksize" in state,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{source.describe()}: {name} is damaged ({error!r})") from None
    if parsed.name not in ("nf4", "fp4"):
        raise WeightError(
            f"{source.describe()}: {name} is quantised as {parsed.name}; nf4, fp4 and int8 are read"
        )
    return parsed
