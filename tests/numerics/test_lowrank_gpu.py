"""Bases of 16-bit gradients on a GPU: Gram matrices by tensor cores are as good as float32 ones."""

from __future__ import annotations

import pytest
import torch

from nibble.numerics import lowrank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_coarse_basis_keeps_what_an_exact_one_does(decay: float, dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    words = {"generator": generator, "device": "cuda"}
    left = torch.linalg.qr(torch.randn(1024, 1024, **words))[0]
    right = torch.linalg.qr(torch.randn(2816, 1024, **words))[0]
    sizes = torch.arange(1, 1025, device="cuda").float() ** -decay
    matrix = ((left * sizes) @ right.mT).to(dtype)
    energies = []
    for coarse in (True, False):
        basis = lowrank.randomised_basis(
            lambda columns, of: lowrank.sketch(matrix, columns=columns, side=of),
            length=2816,
            rank=256,
            side="left",
            generator=torch.Generator(device="cuda").manual_seed(5),
            coarse=coarse,
        )
        gram = basis.double().mT @ basis.double()
        assert (gram - torch.eye(256, device="cuda")).abs().max() < 1e-4
        energies.append((basis.mT @ matrix.float()).square().sum())
    assert energies[0] > 0.995 * energies[1]


def test_nothing_waits_for_the_device() -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    sketch = torch.randn(2048, 256, generator=generator, device="cuda")
    lowrank.orthonormalise(sketch, generator=generator, coarse=True)  # libraries make themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        lowrank.orthonormalise(sketch, generator=generator, coarse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
