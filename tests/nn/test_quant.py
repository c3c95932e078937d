"""QuantLinear equals its dense twin, forward and backward, and never keeps that twin."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nibble.errors import ConfigError, WeightError
from nibble.nn import quant
from nibble.nn.adapted import LowRank
from nibble.nn.quant import PackedWeight, QuantLinear, dense_weight, quantize_
from nibble.nn.targets import replace_
from nibble.numerics.formats import CODECS, pack, unpack
from nibble.spec.config import Quant
from nibble.spec.formats import FormatSpec, format_spec

OUT, IN = 24, 80  # 80: the last block of a row is padded


def spec_of(quant_section: Quant) -> FormatSpec:
    spec = format_spec(quant_section)
    assert spec is not None
    return spec


SPECS = {
    "nf4": spec_of(Quant(format="nf4")),
    "nf4-single": spec_of(Quant(format="nf4", double_quant=False)),
    "fp4": spec_of(Quant(format="fp4")),
    "int8": spec_of(Quant(format="int8")),
    "int8-no-outliers": spec_of(Quant(format="int8", int8_threshold=0.0)),
    "hqq1": spec_of(Quant(format="hqq", bits=1)),
    "hqq2": spec_of(Quant(format="hqq", bits=2)),
    "hqq3": spec_of(Quant(format="hqq", bits=3)),
    "hqq4": spec_of(Quant(format="hqq", bits=4)),
    "hqq8": spec_of(Quant(format="hqq", bits=8)),
    "ternary": spec_of(Quant(format="ternary")),
}
EACH = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make(spec: FormatSpec, *, bias: bool = True, kernels: quant.Choice = "eager") -> QuantLinear:
    linear = QuantLinear(IN, OUT, spec=spec, bias=bias, kernels=kernels).to_empty(device="cpu")
    linear.load_(torch.randn(OUT, IN))
    if linear.bias is not None:
        linear.bias.data.normal_()
    return linear


def test_the_table_covers_every_format() -> None:
    assert {spec.name for spec in SPECS.values()} == set(CODECS)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=["2d", "3d"])
def test_output_and_gradient_are_the_dense_ones(
    spec: FormatSpec, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    linear = make(spec)
    x = torch.randn(*lead, IN, dtype=dtype, requires_grad=True)
    y = linear(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert linear.bias is not None and x.grad is not None
    assert y.dtype == dtype and y.shape == (*lead, OUT)

    weight = unpack(spec, linear.packed(), shape=(OUT, IN), dtype=dtype)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=0, atol=0)
    product = F.linear(x.detach(), weight)
    matmul = CODECS[spec.name].matmul
    if matmul is not None:  # int8 rounds activations too: that product is the truth
        product = matmul(spec, linear.packed(), x.detach())
        error = (product.float() - F.linear(x.detach().float(), weight.float())).norm()
        assert error < 0.02 * product.float().norm()
    torch.testing.assert_close(y.detach(), product + linear.bias.to(dtype), rtol=0, atol=0)
    assert all(p.grad is None for p in linear.parameters())


@EACH
def test_no_dense_weight_lives_between_forward_and_backward(
    spec: FormatSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = make(spec, bias=False)
    made: list[weakref.ref[Tensor]] = []

    def watched(spec: FormatSpec, tensors: dict[str, Tensor], **rest: object) -> Tensor:
        dense = unpack(spec, tensors, **rest)  # type: ignore[arg-type]
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(quant, "select", lambda *_, **__: watched)
    saved: list[Tensor] = []
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x)
    # Nothing waits for backward: the packed tensors are there anyway.
    assert saved == []
    gc.collect()
    assert [ref() for ref in made] == [None] * len(made)
    num_forward = len(made)
    assert num_forward == (1 if CODECS[spec.name].matmul is None else 0)
    y.sum().backward()
    del y
    gc.collect()
    assert len(made) == num_forward + 1 and all(ref() is None for ref in made)


def test_no_graph_where_none_is_asked_for() -> None:
    linear = make(SPECS["nf4"])
    with torch.no_grad():
        alone = linear(torch.ones(2, IN, requires_grad=True))
    assert not alone.requires_grad
    assert not linear(torch.ones(2, IN)).requires_grad


@EACH
def test_under_activation_checkpointing(spec: FormatSpec) -> None:
    linear = make(spec)
    x = torch.randn(3, IN)
    grads = []
    for wrapped in (False, True):
        leaf = x.clone().requires_grad_()
        y = checkpoint(linear, leaf, use_reentrant=False) if wrapped else linear(leaf)
        y.square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@EACH
def test_packed_tensors_never_change_type(spec: FormatSpec) -> None:
    linear = make(spec)
    before = {name: tensor.clone() for name, tensor in linear.packed().items()}
    for change in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to("cpu", torch.float16),
    ):
        change(linear)
        for name, tensor in linear.packed().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
            assert isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    assert linear.bias is not None and linear.bias.dtype == torch.float16


@EACH
def test_state_dict_round_trip_through_meta(spec: FormatSpec) -> None:
    linear = make(spec)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    other = QuantLinear(IN, OUT, spec=spec, bias=True, kernels="eager").to_empty(device="cpu")
    other.load_state_dict(state)
    assigned = QuantLinear(IN, OUT, spec=spec, bias=True, kernels="eager")
    assigned.load_state_dict(state, assign=True)
    x = torch.randn(2, IN)
    for twin in (other, assigned, copy.deepcopy(linear)):
        torch.testing.assert_close(twin(x), linear(x), rtol=0, atol=0)


@EACH
def test_load_takes_packed_tensors_verbatim_and_refuses_others(spec: FormatSpec) -> None:
    weight = torch.randn(OUT, IN, dtype=torch.bfloat16)
    tensors = pack(spec, weight)
    linear = make(spec)
    linear.load_(PackedWeight(spec=spec, tensors=tensors))
    for name, tensor in linear.packed().items():
        assert torch.equal(tensor, tensors[name])
    dense = make(spec)
    dense.load_(weight)
    torch.testing.assert_close(
        dense_weight(dense, torch.float32), linear.dense(torch.float32), rtol=0, atol=0
    )
    with pytest.raises(WeightError, match=r"codes must be .* is absent"):
        linear.load_(PackedWeight(spec=spec, tensors={}))
    with pytest.raises(WeightError, match="does not fit a linear"):
        linear.load_(weight.t())
    other = SPECS["nf4" if spec.name == "ternary" else "ternary"]
    with pytest.raises(WeightError, match="to be stored as"):
        linear.load_(PackedWeight(spec=other, tensors=pack(other, weight)))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, 8, bias=False)


class Model(nn.Module):
    """The least that has every case: blocks, a head, a tied pair, a classification head."""

    def __init__(self, *, experts: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.tied = nn.Linear(8, 16, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(8, 16)
        self.classifier = Head()
        self.conv = nn.Conv1d(8, 8, 3)
        if experts:
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.empty(4, 8, 8))
            self.experts.down_proj = nn.Parameter(torch.empty(4, 8, 8))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def meta_model(*, experts: bool = False) -> Model:
    with torch.device("meta"):
        model = Model(experts=experts)
        model.tied.weight = model.embed.weight
    return model


def test_quantize_takes_linears_and_spares_heads_and_ties() -> None:
    model = meta_model()
    spec = SPECS["nf4"]
    names = quantize_(model, spec, keep=[], kernels="eager")
    assert names == [f"layers.{i}.{p}_proj" for i in range(2) for p in "qo"]
    assert {n for n, m in model.named_modules() if isinstance(m, QuantLinear)} == set(names)
    taken = model.get_submodule("layers.0.q_proj")
    assert isinstance(taken, QuantLinear) and taken.bias is not None
    assert taken.bias.device.type == "meta" and not taken.bias.requires_grad
    assert model.get_submodule("layers.0.o_proj").bias is None
    assert quantize_(meta_model(), None) == []


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (["o_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (["layers.1"], ["layers.0.q_proj", "layers.0.o_proj"]),
        ([r"layers\.\d\.q_proj", "lm_head"], ["layers.0.o_proj", "layers.1.o_proj"]),
    ],
)
def test_keep_by_name_folder_or_expression(keep: list[str], left: list[str]) -> None:
    assert quantize_(meta_model(), SPECS["int8"], keep=keep) == left


def test_keep_and_experts_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"quant.keep: 'oproj' names no module; nearest: o_proj"):
        quantize_(meta_model(), SPECS["nf4"], keep=["oproj"])
    with pytest.raises(ConfigError, match=r"regular expression"):
        quantize_(meta_model(), SPECS["nf4"], keep=["*_proj"])
    with pytest.raises(ConfigError, match=r"finds no linear to store"):
        quantize_(meta_model(), SPECS["nf4"], keep=[".*_proj"])
    with pytest.raises(ConfigError, match=r"experts.gate_up_proj .*quant.keep=\[experts\]"):
        quantize_(meta_model(experts=True), SPECS["nf4"])
    model = meta_model(experts=True)
    assert len(quantize_(model, SPECS["nf4"], keep=["experts"])) == 4
    assert model.get_parameter("experts.down_proj").dim() == 3


def test_quantize_on_a_loaded_model_packs_its_values() -> None:
    model = Attention()
    weight = model.q_proj.weight.detach().clone()
    quantize_(model, SPECS["hqq8"], kernels="eager")
    taken = model.get_submodule("q_proj")
    assert isinstance(taken, QuantLinear)
    torch.testing.assert_close(taken.dense(torch.float32), weight, atol=2e-3, rtol=0)
    plain = nn.Linear(4, 4)
    replace_(model, "q_proj", plain)
    assert dense_weight(plain, torch.float32).data_ptr() == plain.weight.data_ptr()


@pytest.mark.parametrize("scaling", [1.0, 0.7])
@pytest.mark.parametrize("apart", [False, True], ids=["same-x", "dropped-x"])
@pytest.mark.parametrize("spec", [SPECS["nf4"], SPECS["hqq3"]], ids=["nf4", "hqq3"])
def test_an_update_is_summed_into_output_and_gradients(
    spec: FormatSpec, apart: bool, scaling: float
) -> None:
    """Against the textbook sum of two linears by autograd, fp32; only x' and x' A^T are kept."""
    linear = make(spec)
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(2, 3, IN, generator=generator) for _ in range(2)]
    leaves += [torch.randn(4, IN, generator=generator), torch.randn(OUT, 4, generator=generator)]
    x, dropped, a, b = (leaf.requires_grad_() for leaf in leaves)
    seen = dropped if apart else x
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, LowRank(seen, a, b, scaling))
    assert [tuple(t.shape) for t in saved] == [(6, IN), (6, 4)]
    grad = torch.randn(y.shape, generator=generator)
    wanted = [leaf for leaf in (x, dropped, a, b) if apart or leaf is not dropped]
    found = torch.autograd.grad(y, wanted, grad)
    product = F.linear(x, linear.dense(torch.float32), linear.bias)
    reference = product + scaling * F.linear(F.linear(seen, a), b)
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(reference, wanted, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
