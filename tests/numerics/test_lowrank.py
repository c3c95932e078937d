"""Bases, projection, residuals and packed bases against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nibble.errors import ConfigError
from nibble.numerics import lowrank
from nibble.spec.lowrank import BASIS_STORAGE, METHODS, LowRank, matrix_shape

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(rows: int, columns: int, *, power: float, seed: int = 0) -> Tensor:
    """A matrix with singular values 1, 2^-power, 3^-power, ..."""
    generator = seeded(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator))[0]
    return left @ torch.diag(torch.arange(1, size + 1) ** -power) @ right.T


def orthogonality_error(basis: Tensor) -> float:
    return (basis.T @ basis - torch.eye(basis.shape[1])).abs().max().item()


def randomised(**words: Any) -> Tensor:
    """A randomised basis by itself."""
    (basis,) = lowrank.together([lowrank.randomised_basis(**words)])
    return basis


def tail(matrix: Tensor, *, basis: Tensor, side: str) -> float:
    """Norm of what the basis leaves of a matrix."""
    oriented = matrix if side == "left" else matrix.T
    return torch.linalg.matrix_norm(oriented - basis @ (basis.T @ oriented)).item()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_svd_is_optimal(shape: tuple[int, int], side: str) -> None:
    matrix = torch.randn(shape, generator=seeded())
    basis = lowrank.svd_basis(matrix, rank=20, side=side)
    assert basis.shape == (shape[0] if side == "left" else shape[1], 20)
    assert orthogonality_error(basis) < 1e-5
    best = torch.linalg.vector_norm(torch.linalg.svdvals(matrix)[20:]).item()
    assert tail(matrix, basis=basis, side=side) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("power", "bound"), [(0.5, 1.06), (1.0, 1.10), (2.0, 1.25)])
def test_randomised_is_close_to_svd(side: str, power: float, bound: float) -> None:
    matrix = decaying(160, 120, power=power)
    best = tail(matrix, basis=lowrank.svd_basis(matrix, rank=24, side=side), side=side)
    words: Any = {
        "product": lambda columns, of: lowrank.sketch(matrix, columns=columns, side=of),
        "length": 120 if side == "left" else 160,
        "rank": 24,
        "side": side,
    }
    basis = randomised(**words, generator=seeded(5))
    assert orthogonality_error(basis) < 1e-5
    assert best <= tail(matrix, basis=basis, side=side) <= bound * best
    # Without power iteration it is the plain range finder, whose expected error with k + p = r
    # columns is at most sqrt(1 + k / (p - 1)) of the best of rank k (arXiv 0909.4061, th. 10.5).
    plain = randomised(**words, generator=seeded(5), num_power_iterations=0)
    half = torch.linalg.vector_norm(torch.linalg.svdvals(matrix)[12:]).item()
    assert tail(matrix, basis=plain, side=side) <= (1 + 12 / 11) ** 0.5 * half


def test_a_guided_sketch_is_a_power_iteration_and_still_finds_what_is_new() -> None:
    matrix = decaying(160, 120, power=0.5)
    best = tail(matrix, basis=lowrank.svd_basis(matrix, rank=24, side="left"), side="left")

    def tail_of(guide: Tensor | None) -> float:
        columns = lowrank.sketch_columns(120, rank=24, generator=seeded(5), guide=guide)
        found = lowrank.sketch(matrix, columns=columns, side="left")
        return tail(matrix, basis=lowrank.orthonormalise(found, generator=seeded()), side="left")

    blind = lowrank.orthonormalise(
        lowrank.sketch(
            matrix, columns=lowrank.sketch_columns(120, rank=24, generator=seeded(6)), side="left"
        ),
        generator=seeded(),
    )
    guided = tail_of((blind.T @ matrix).T)
    assert best <= guided < best + 0.5 * (tail_of(None) - best)
    # No guide yet: as good as none at all.
    assert tail_of(torch.zeros(120, 24)) == pytest.approx(tail_of(None), rel=1e-4)
    # A guide that misses the largest direction altogether: the noise lets it in.
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    columns = lowrank.sketch_columns(120, rank=24, generator=seeded(5), guide=right[50:74].T)
    basis = lowrank.orthonormalise(
        lowrank.sketch(matrix, columns=columns, side="left"), generator=seeded()
    )
    assert torch.linalg.vector_norm(basis.T @ left[:, 0]) > 0.2


def test_orthonormalise_survives_what_cholesky_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        lowrank, "householder", lambda columns: calls.append(1) or _householder(columns)
    )
    good = torch.randn(300, 40, generator=seeded())
    basis = lowrank.orthonormalise(good, generator=seeded(1))
    assert orthogonality_error(basis) < 2e-6 and not calls
    # Of rank one, of rank none, and of columns that differ by a billion.
    one = torch.randn(300, 1, generator=seeded()) @ torch.randn(1, 40, generator=seeded(2))
    for sketch in (one, torch.zeros(300, 40), good * torch.logspace(0, -9, 40)):
        assert orthogonality_error(lowrank.orthonormalise(sketch, generator=seeded(1))) < 1e-5
    for share in (0.25, 0.5, 0.75):
        rank = int(400 * share)
        few = torch.randn(400, 3, generator=seeded()) @ torch.randn(3, rank, generator=seeded(2))
        assert orthogonality_error(lowrank.orthonormalise(few, generator=seeded(1))) < 1e-4
    assert not calls
    # Nearly square, noise conditions nothing: there it is looked at.
    square = torch.randn(120, 1, generator=seeded()) @ torch.randn(1, 120, generator=seeded(2))
    monkeypatch.setattr(lowrank, "JITTER", 0.0)
    assert orthogonality_error(lowrank.orthonormalise(square, generator=seeded(1))) < 1e-5
    assert calls


_householder = lowrank.householder


def test_both_ways_to_orthonormalise_agree() -> None:
    columns = torch.randn(200, 30, generator=seeded())
    basis = lowrank.orthonormalise(columns, generator=seeded(1))
    expected = lowrank.householder(lowrank._jittered(columns, seeded(1)))
    assert torch.allclose(basis, expected, atol=2e-6)


def test_a_basis_is_the_same_for_one_batch_and_many_even_without_rank() -> None:
    # Twelve tokens, rank 24: half of the basis stands on noise, and must not stand on rounding.
    inputs, errors = (
        torch.randn(12, 80, generator=seeded()),
        torch.randn(12, 64, generator=seeded(1)),
    )
    columns = lowrank.sketch_columns(80, rank=24, generator=seeded(3))
    whole = lowrank.sketch(errors.T @ inputs, columns=columns, side="left")
    parts = sum(
        lowrank.sketch(errors[i : i + 3].T @ inputs[i : i + 3], columns=columns, side="left")
        for i in range(0, 12, 3)
    )
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)
    one = lowrank.orthonormalise(whole, generator=seeded(4))
    other = lowrank.orthonormalise(parts, generator=seeded(4))
    assert (one - other).abs().max() < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_projecting_back_is_an_orthogonal_projection(proj_type: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(48, 40, generator=seeded())
    left = lowrank.random_basis(48, rank=8, generator=seeded(1)) if proj_type != "right" else None
    right = lowrank.random_basis(40, rank=8, generator=seeded(2)) if proj_type != "left" else None
    small = lowrank.project(matrix.to(dtype), left=left, right=right)
    assert small.dtype == dtype
    expected = matrix
    if left is not None:
        expected = left @ left.T @ expected
    if right is not None:
        expected = expected @ right @ right.T
    back = lowrank.project_back(small.to(dtype), left=left, right=right)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert back.dtype == dtype
    assert torch.allclose(back.float(), expected, atol=tolerance)


def test_random_projections() -> None:
    basis = lowrank.random_basis(512, rank=64, generator=seeded())
    assert orthogonality_error(basis) < 1e-5
    assert torch.equal(basis, lowrank.random_basis(512, rank=64, generator=seeded()))
    assert not torch.allclose(basis, lowrank.random_basis(512, rank=64, generator=seeded(1)))
    # A Gaussian one keeps norms in the mean: chi-squared over 64 entries, 200 vectors.
    vectors = torch.randn(512, 200, generator=seeded(2))
    columns = lowrank.gaussian_projection(512, rank=64, generator=seeded(3))
    ratio = (columns.T @ vectors).square().sum(0) / vectors.square().sum(0)
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.05)


def test_similarity_sees_spans_not_signs() -> None:
    basis = lowrank.random_basis(256, rank=16, generator=seeded())
    rotation = lowrank.random_basis(16, rank=16, generator=seeded(1))
    assert lowrank.subspace_similarity(basis, basis @ rotation).item() == pytest.approx(1, abs=1e-5)
    other = lowrank.random_basis(256, rank=16, generator=seeded(2))
    assert lowrank.subspace_similarity(basis, other).item() == pytest.approx(16 / 256, abs=0.03)
    mixed = torch.cat(
        (basis[:, :8], -lowrank.householder(torch.cat((basis, other), 1))[:, 16:24]), 1
    )
    assert lowrank.subspace_similarity(basis, mixed).item() == pytest.approx(0.5, abs=1e-5)


def test_ratios_and_growth() -> None:
    updates = torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, 1.0]])
    grads = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    ratios = lowrank.channel_ratios(updates, grads, dim=0)
    assert ratios.tolist() == [[5.0, 4.0, 0.0]]
    assert lowrank.tensor_ratio(updates, grads).item() == pytest.approx((31 / 1.25) ** 0.5)
    assert lowrank.tensor_ratio(updates, torch.zeros(2, 3)).item() == 0
    one = torch.tensor(1.0)
    for norm, previous, factor in ((5.0, 0.0, 1.0), (1.005, 1.0, 1.0), (2.02, 1.0, 0.5)):
        found = lowrank.growth_factor(one * norm, one * previous, norm_growth=1.01)
        assert found.item() == pytest.approx(factor)


@pytest.mark.parametrize("shape", [(64, 16), (33, 7), (100, 3), (1, 1)])
@pytest.mark.parametrize("storage", BASIS_STORAGE)
def test_packed_bases(storage: str, shape: tuple[int, int]) -> None:
    basis = torch.randn(shape, generator=seeded()) / shape[0] ** 0.5
    stored = lowrank.pack_basis(basis, storage=storage)
    specs = LowRank(rank=shape[1], basis_storage=storage, proj_type="left").tensors(
        (shape[0], max(shape))
    )
    found = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in stored]
    assert found == [(spec.shape, spec.dtype) for spec in specs.values()]
    values = lowrank.unpack_basis(stored, storage=storage, shape=shape, dtype=torch.float32)
    # Half a step of the largest of 256 neighbours.
    step = {"fp32": 0.0, "bf16": 2**-7, "int8": 1 / 127, "int4": 1 / 7}[storage]
    flat, error = basis.view(-1), (values - basis).abs().view(-1)
    for start in range(0, flat.numel(), 256):
        block = slice(start, start + 256)
        assert error[block].max() <= 0.5 * step * flat[block].abs().max() * 1.001 + 1e-9


def test_int4_takes_half_a_byte() -> None:
    stored = lowrank.pack_basis(
        lowrank.random_basis(512, rank=64, generator=seeded()), storage="int4"
    )
    assert sum(tensor.nbytes for tensor in stored) == 512 * 64 // 2 + 512 * 64 // 256 * 4
    values = lowrank.unpack_basis(stored, storage="int4", shape=(512, 64), dtype=torch.float32)
    assert orthogonality_error(values) < 0.1
    # A block of one sign keeps its values apart, which an offset of whole steps would not.
    one_sign = torch.tensor([[1.2], [2.0]])
    codes = lowrank.pack_basis(one_sign, storage="int4")
    again = lowrank.unpack_basis(codes, storage="int4", shape=(2, 1), dtype=torch.float32)
    assert again.view(-1).tolist() == pytest.approx([8 / 7, 2.0])


def test_shapes_and_sides() -> None:
    assert matrix_shape((3, 8, 5)) == (24, 5)  # a stack of experts
    assert matrix_shape((6, 3, 2, 2)) == (6, 12)  # a kernel
    low = LowRank(rank=4)
    assert low.sides((8, 8)) == ("right",) and low.sides((7, 8)) == ("left",)
    assert low.projected_shape((7, 8)) == (4, 8) and low.projected_shape((9, 8)) == (9, 4)
    other = LowRank(rank=4, proj_type="reverse_std")
    assert other.projected_shape((7, 8)) == (7, 4) and other.projected_shape((9, 8)) == (4, 8)
    assert LowRank(rank=4, proj_type="full").projected_shape((9, 8)) == (4, 4)
    assert low.projects((4, 9)) and not low.projects((3, 9)) and not low.projects((99,))


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_legal(name: str) -> None:
    row = {key: value for key, value in METHODS[name].items() if key not in ("rule", "codec")}
    LowRank(**{"rank": 4, **row}).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_type": "both"}, "unknown proj_type 'both': use one of std, reverse_std, left"),
        ({"basis": "qr"}, "unknown basis 'qr'"),
        ({"residual": "apollo"}, "unknown residual 'apollo'"),
        ({"basis_storage": "int3"}, "unknown basis_storage 'int3'"),
        ({"rank": -1}, "rank=-1 is out of range"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"norm_growth": 0.9}, "norm_growth=0.9"),
        ({"lazy_threshold": 1.0}, "lazy_threshold=1.0"),
        ({"basis": "seeded"}, "basis 'seeded' is not orthonormal"),
        ({"basis": "seeded", "residual": "tensor", "basis_storage": "int4"}, "no effect"),
        ({"basis": "random", "lazy_threshold": 0.4}, "lazy_threshold=0.4 has no effect"),
        ({"proj_type": "full", "residual": "fira"}, "leaves no channels"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LowRank(**{"rank": 4, **options}).check()


@pytest.mark.parametrize(("decay", "kept"), [(0.0, 0.97), (0.5, 0.97), (1.0, 0.995), (2.0, 0.999)])
def test_a_coarse_basis_keeps_what_an_exact_one_does(
    decay: float, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "FEW", 0)
    generator = seeded(3)
    left = torch.linalg.qr(torch.randn(160, 160, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(300, 160, generator=generator))[0]
    sizes = torch.arange(1, 161).float() ** -decay
    matrix = ((left * sizes) @ right.mT).to(torch.bfloat16)
    words = {
        "product": lambda columns, of: lowrank.sketch(matrix, columns=columns, side=of),
        "length": 300,
        "rank": 40,
        "side": "left",
    }
    energies = []
    for coarse in (True, False):
        basis = randomised(**words, generator=seeded(5), coarse=coarse)
        assert orthogonality_error(basis) < 1e-5
        energies.append((basis.mT @ matrix.float()).square().sum() / sizes[:40].square().sum())
    assert energies[0] > 0.998 * energies[1]
    assert energies[0] > (kept if decay > 0.5 else 0.9)


@pytest.mark.parametrize("few", [0, 128])
@pytest.mark.parametrize("num_directions", [0, 1, 7, 64])
def test_a_coarse_basis_of_few_directions_is_orthonormal(
    num_directions: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "FEW", few)
    generator = seeded(4)
    sketch = torch.zeros(512, 64)
    if num_directions:
        columns = torch.randn(512, num_directions, generator=generator)
        sketch = columns @ torch.randn(num_directions, 64, generator=generator)
    basis = lowrank.orthonormalise(sketch, generator=seeded(5), coarse=True)
    assert orthogonality_error(basis) < 1e-5
    assert orthogonality_error(basis.to(torch.bfloat16).float()) < 2e-3
    if num_directions:
        rest = columns - basis @ (basis.mT @ columns)  # a jitter of columns hides weak directions
        assert rest.norm() < 0.1 * columns.norm()
