"""Bases of 16-bit gradients on a GPU: Gram matrices by tensor cores are as good as float32 ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

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
        making = lowrank.randomised_basis(
            lambda columns, of: lowrank.sketch(matrix, columns=columns, side=of),
            length=2816,
            rank=256,
            side="left",
            generator=torch.Generator(device="cuda").manual_seed(5),
            coarse=coarse,
        )
        (basis,) = lowrank.together([making])
        gram = basis.double().mT @ basis.double()
        assert (gram - torch.eye(256, device="cuda")).abs().max() < 1e-4
        energies.append((basis.mT @ matrix.float()).square().sum())
    assert energies[0] > 0.995 * energies[1]


def test_nothing_waits_for_the_device(
    no_waiting: Callable[[], AbstractContextManager[None]],
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    sketches = torch.randn(10, 2048, 256, generator=generator, device="cuda")

    def make() -> None:
        for sketch in (sketches[0], sketches[1, :, :100]):
            lowrank.orthonormalise(sketch, generator=generator, coarse=True)
        for number in (3, 10):  # libraries have other ways for few and for many
            list(lowrank.together([making(sketch) for sketch in sketches[:number]]))

    def making(sketch: torch.Tensor) -> lowrank.Making:
        return lowrank.randomised_basis(
            lambda columns, of: lowrank.sketch(sketch, columns=columns, side=of),
            length=256,
            rank=150,
            side="left",
            generator=generator,
            coarse=True,
        )

    make()  # libraries make themselves up
    with no_waiting():
        make()


@pytest.mark.parametrize("num_directions", [0, 1, 7, 4096])
def test_bases_made_together_are_those_made_alone(num_directions: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(1)
    words = {"generator": generator, "device": "cuda"}
    matrices = []
    for _ in range(10):
        few = torch.randn(2048, num_directions, **words)
        matrix = few @ torch.randn(num_directions, 2048, **words)
        matrices.append(matrix.to(torch.bfloat16))

    def making(number: int) -> lowrank.Making:
        return lowrank.randomised_basis(
            lambda columns, of: lowrank.sketch(matrices[number], columns=columns, side=of),
            length=2048,
            rank=1024,
            side="left",
            generator=torch.Generator(device="cuda").manual_seed(number),
            coarse=True,
        )

    found = list(lowrank.together([making(number) for number in range(10)]))
    again = list(lowrank.together([making(number) for number in range(10)]))
    one = torch.eye(1024, device="cuda")
    for number, (basis, second) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(basis, second)
        assert (basis.double().mT @ basis.double() - one).abs().max() < 1e-3
        stored = basis.to(torch.bfloat16).float()
        # An entry is rounded by 2**-9 of itself at most, and a square by twice that.
        assert (stored.mT @ stored - one).abs().max() < 2**-8
        (alone,) = lowrank.together([making(number)])
        if num_directions > 1024:
            assert lowrank.subspace_similarity(alone, basis) > 0.99
            continue
        # Directions that only the noise of bf16 tells apart may turn; the true ones are there.
        matrix = matrices[number].float()
        for made in (basis, alone):
            assert (matrix - made @ (made.mT @ matrix)).norm() <= 4e-3 * matrix.norm()
