"""Sizes of packed weights, by hand, and the defaults of a recipe's quant section."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nibble.errors import ConfigError
from nibble.spec.config import Quant
from nibble.spec.formats import FormatSpec, TensorSpec, format_spec


def spec(**options: object) -> FormatSpec:
    made = format_spec(Quant(**options))  # type: ignore[arg-type]
    assert made is not None
    return made


def test_defaults_are_those_of_the_papers() -> None:
    assert format_spec(Quant()) is None
    assert spec(format="nf4") == FormatSpec(name="nf4", bits=4, block=64, double_quant=True)
    assert spec(format="fp4", double_quant=False) == FormatSpec(name="fp4", bits=4, block=64)
    assert spec(format="int8") == FormatSpec(name="int8", bits=8, int8_threshold=6.0)
    assert spec(format="int8", int8_threshold=0).int8_threshold == 0
    assert spec(format="hqq") == FormatSpec(name="hqq", bits=4, block=64)
    assert spec(format="hqq", bits=3, block=32) == FormatSpec(name="hqq", bits=3, block=32)
    assert spec(format="ternary") == FormatSpec(name="ternary", bits=2)


@pytest.mark.parametrize("block", [24, 100, 8192])
def test_a_block_that_cannot_be_packed_is_refused_with_what_can(block: int) -> None:
    with pytest.raises(ConfigError, match=rf"block={block}.*power of two from 16 to 4096"):
        format_spec(Quant(format="nf4", block=block))


def test_a_block_below_16_is_refused_by_the_recipe() -> None:
    with pytest.raises(ValidationError):
        Quant(format="nf4", block=8)


# Bytes worked out by hand for 10 rows of 4096: (options, bytes of a row).
ROWS = [
    ({"format": "nf4", "double_quant": False}, 2048 + 64 * 4),
    ({"format": "nf4"}, 2048 + 64 + 4 + 4),
    ({"format": "fp4", "block": 16}, 2048 + 256 + 4 + 4),
    ({"format": "nf4", "block": 128}, 2048 + 32 + 8),
    ({"format": "int8"}, 4096 + 4),
    ({"format": "hqq", "bits": 1}, 512 + 64 * 4),
    ({"format": "hqq", "bits": 2}, 1024 + 64 * 4),
    ({"format": "hqq", "bits": 3}, 1536 + 64 * 4),
    ({"format": "hqq", "bits": 4}, 2048 + 64 * 4),
    ({"format": "hqq", "bits": 8}, 4096 + 64 * 8),
    ({"format": "ternary"}, 824 + 4),
]


@pytest.mark.parametrize(("options", "row_bytes"), ROWS)
def test_bytes_of_a_row(options: dict[str, object], row_bytes: int) -> None:
    assert spec(**options).nbytes((10, 4096)) == 10 * row_bytes


def test_padding_of_the_last_block_is_counted() -> None:
    # 100 columns are two blocks of 64: 64 bytes of codes, 2 scales, 8 bytes of step and offset.
    assert spec(format="nf4").nbytes((3, 100)) == 3 * (64 + 2 + 8)
    # 1 block: its 8-bit scale is padded to an even row.
    assert spec(format="nf4").tensors((3, 64))["scales"] == TensorSpec(shape=(3, 2), dtype="uint8")


def test_double_quantisation_steps_cover_256_scales() -> None:
    tensors = spec(format="nf4").tensors((1, 64 * 257))
    assert tensors["scale_steps"].shape == tensors["scale_offsets"].shape == (1, 2)
    assert tensors["scales"].shape == (1, 258)


@pytest.mark.parametrize(("options", "_"), ROWS)
def test_rows_are_independent_in_shape_and_of_even_bytes(
    options: dict[str, object], _: int
) -> None:
    made = spec(**options)
    for columns in (64, 96, 576, 1000, 4096):
        one, seven = made.tensors((1, columns)), made.tensors((7, columns))
        for name, tensor in seven.items():
            assert tensor.shape == (7, *one[name].shape[1:])
            assert tensor.dtype != "uint8" or tensor.shape[1] % 2 == 0
        assert made.nbytes((7, columns)) == 7 * made.nbytes((1, columns))


def test_double_quantisation_saves_what_the_recipe_says() -> None:
    shape = (4096, 4096)
    saved = spec(format="nf4", double_quant=False).nbytes(shape) - spec(format="nf4").nbytes(shape)
    assert saved * 8 / (4096 * 4096) == pytest.approx(0.37, abs=0.02)
