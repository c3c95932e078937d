"""INT8 weights with a scale a group: bounds of the error, and rounding without bias."""

from __future__ import annotations

import pytest
import torch

from nibble.numerics.int8_weights import decode, encode
from nibble.numerics.rounding import random_bits
from nibble.spec.int8_weights import GROUP, int8_weight_tensors

torch.set_num_threads(1)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(values.numel(), dtype=torch.int32).view(values.shape)
    return random_bits(numbers, key=(1, 2))


@pytest.mark.parametrize("shape", [(8, 512), (3, 300), (5, 7), (1, 1)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_error_is_within_a_step_and_bytes_are_planned(
    shape: tuple[int, int], stochastic: bool
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = bits_of(values) if stochastic else None
    codes, scales = encode(values, bits=noise)
    planned = int8_weight_tensors(shape)
    for tensor, spec in ((codes, planned["codes"]), (scales, planned["scales"])):
        assert tuple(tensor.shape) == spec.shape and tensor.nbytes == spec.nbytes
    error = (decode(codes, scales, dtype=torch.float32) - values).abs()
    for start in range(0, shape[1], GROUP):
        group = values[:, start : start + GROUP]
        step = group.abs().amax(1, keepdim=True) / 127
        bound = step if stochastic else step / 2
        assert (error[:, start : start + GROUP] <= bound * 1.0001).all()


def test_any_rows_are_a_weight() -> None:
    values = torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(values, bits=None)
    some = decode(codes[2:5], scales[2:5], dtype=torch.float32)
    assert torch.equal(some, decode(codes, scales, dtype=torch.float32)[2:5])
    again, steps = encode(some, bits=None)
    assert torch.equal(again, codes[2:5]) and torch.allclose(steps, scales[2:5])


def test_zeros_stay_and_single_signs_keep_apart() -> None:
    codes, scales = encode(torch.zeros(2, 300), bits=bits_of(torch.zeros(2, 300)))
    assert not codes.any() and not scales.any()
    values = torch.tensor([[1.0, 2.0]])
    codes, scales = encode(values, bits=None)
    assert torch.allclose(decode(codes, scales, dtype=torch.float32), values, rtol=0.01)


def test_stochastic_rounding_has_no_bias() -> None:
    values = torch.full((4000, 256), 0.3)
    values[:, 0] = 127.0
    codes, scales = encode(values, bits=bits_of(values))
    assert torch.equal(scales, torch.ones(4000, 1))
    assert codes[:, 1:].float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert set(codes[:, 1:].unique().tolist()) == {0, 1}
    assert not encode(values, bits=None)[0][:, 1:].any()
