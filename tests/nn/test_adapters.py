"""Adapters around every format: gradients of a dense reference, peft's targets, honest counts."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from nibble.errors import ConfigError
from nibble.nn.adapters import (
    LoraLinear,
    adapt_,
    adapters,
    finish_loading_,
    locate,
    reset_parameters_,
    target_names,
)
from nibble.nn.quant import QuantLinear, dense_weight, quantize_
from nibble.numerics.formats import CODECS
from nibble.spec.config import Adapter, AdapterKind, FormatName, Quant
from nibble.spec.formats import FormatSpec, format_spec

OUT, IN, RANK = 24, 80, 4
# int8: threshold 0 makes every column ordinary; its product also rounds x, so the forward pass
# differs from the dense one.
FORMATS: dict[FormatName, Quant] = {
    "none": Quant(),
    "nf4": Quant(format="nf4"),
    "fp4": Quant(format="fp4"),
    "int8": Quant(format="int8", int8_threshold=0.0),
    "hqq": Quant(format="hqq", bits=3),
    "ternary": Quant(format="ternary"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def base_of(spec: FormatSpec | None, dtype: torch.dtype) -> nn.Module:
    plain = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    if spec is None:
        return plain
    linear = QuantLinear(IN, OUT, spec=spec, bias=True, dtype=dtype, kernels="eager", device="cpu")
    linear.load_(plain.weight)
    linear.get_parameter("bias").data.copy_(plain.bias)
    return linear


def reference(module: LoraLinear, x: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and leaves of the textbook formula on a dense weight, in the type of `weight`."""
    leaves = [module.lora_A, module.lora_B]
    leaves += [] if module.magnitude is None else [module.magnitude]
    leaves = [leaf.detach().to(weight.dtype).requires_grad_() for leaf in leaves]
    merged = weight + module.scaling * leaves[1] @ leaves[0]
    if module.magnitude is not None:
        norm = merged.detach().norm(dim=1)
        merged = (leaves[2] / norm).unsqueeze(1) * merged
    return F.linear(x, merged, module.base.get_parameter("bias").to(weight.dtype)), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_a_dense_reference(
    name: FormatName, kind: AdapterKind, dtype: torch.dtype
) -> None:
    """A, B, magnitude and x against autograd on the dequantised weight, in float64.

    fp32: 1e-5 of each gradient's norm. bf16: inputs and outputs carry 8 bits, so 2 %. int8's
    forward rounds x to 8 bits as well (about 1 % of the output): only DoRA's magnitude reads that
    output, so it alone gets 2 %.
    """
    spec = format_spec(FORMATS[name])
    module = LoraLinear(base_of(spec, dtype), rank=RANK, alpha=8.0, dora=kind == "dora")
    module.reset_parameters_("layer", generator=seeded())
    module.finish_loading_()
    with torch.no_grad():
        module.lora_B.normal_(std=0.3)
        if module.magnitude is not None:
            module.magnitude.mul_(1 + 0.2 * torch.randn(OUT))
    x = torch.randn(3, 7, IN, dtype=dtype, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    exact_x = x.detach().double().requires_grad_()
    expected, leaves = reference(module, exact_x, dense_weight(module.base, dtype).double())
    expected.backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    rounded = 2e-2 if name == "int8" else tolerance

    def close(given: Tensor | None, wanted: Tensor | None, bound: float) -> None:
        assert given is not None and wanted is not None
        assert (given.double() - wanted).norm() <= bound * wanted.norm()

    assert y.dtype == dtype
    close(y.detach(), expected.detach(), rounded)
    close(x.grad, exact_x.grad, tolerance)
    close(module.lora_A.grad, leaves[0].grad, tolerance)
    close(module.lora_B.grad, leaves[1].grad, tolerance)
    assert module.lora_A.grad is not None and module.lora_A.grad.dtype == torch.float32
    if module.magnitude is not None:
        close(module.magnitude.grad, leaves[2].grad, rounded)
    assert all(p.grad is None for p in module.base.parameters())
    merged = F.linear(exact_x, module.merged_weight(torch.float32).double())
    close(
        (merged + module.base.get_parameter("bias").double()).detach(), expected.detach(), tolerance
    )


def test_the_table_covers_every_format() -> None:
    assert set(FORMATS) == {"none", *CODECS}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_waits_for_backward_is_no_weight(kind: AdapterKind) -> None:
    spec = format_spec(Quant(format="nf4"))
    module = LoraLinear(base_of(spec, torch.bfloat16), rank=RANK, alpha=8.0, dora=kind == "dora")
    x = torch.randn(2, IN, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    packed = {t.data_ptr() for t in module.base.parameters()}
    assert max(t.numel() for t in saved if t.data_ptr() not in packed) < OUT * IN / 2
    # x is saved as it came: never as an fp32 copy.
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in saved)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_changes_nothing(kind: AdapterKind) -> None:
    for name, section in FORMATS.items():
        module = LoraLinear(
            base_of(format_spec(section), torch.float32), rank=RANK, alpha=8.0, dora=kind == "dora"
        )
        module.reset_parameters_("layer", generator=seeded())
        module.finish_loading_()
        x = torch.randn(2, IN)
        torch.testing.assert_close(module(x), module.base(x), msg=name)


def test_dora_small_magnitude_updates_survive_bf16() -> None:
    """1.01 is no bf16 number (1.0078 is nearest); the outputs must still grow by 1 % on average."""
    base = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module = LoraLinear(base, rank=RANK, alpha=8.0, dora=True)
    module.finish_loading_()
    assert module.magnitude is not None
    with torch.no_grad():
        module.magnitude.mul_(1.01)
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    before, after = base(x).float(), module(x).float()
    assert 1.0095 < ((after * before).sum() / before.square().sum()).item() < 1.0105


def test_dropout_is_pefts() -> None:
    """LoRA drops the adapter's input only; DoRA's rescaling sees dropout(x), its base part x."""
    x = torch.randn(5, IN)
    for dora in (False, True):
        module = LoraLinear(
            base_of(None, torch.float32), rank=RANK, alpha=8.0, dropout=0.4, dora=dora
        )
        module.reset_parameters_("layer", generator=seeded())
        module.finish_loading_()
        with torch.no_grad():
            module.lora_B.normal_()
        torch.manual_seed(3)
        given = module(x)
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.4)
        weight, bias = module.base.get_parameter("weight"), module.base.get_parameter("bias")
        update = F.linear(dropped, module.delta())
        if module.magnitude is None:
            expected = F.linear(x, weight, bias) + update
        else:
            gain = module.magnitude / (weight + module.delta()).norm(dim=1)
            expected = F.linear(x, weight, bias) + (gain - 1) * F.linear(dropped, weight)
            expected = expected + gain * update
        torch.testing.assert_close(given, expected)
        module.eval()
        torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def model(order: str) -> nn.Module:
        built = nn.Module()
        for name in order:
            built.add_module(name, nn.Linear(6, 6))
        return built

    config = Adapter(kind="lora", rank=2)
    one, two, other = model("abc"), model("ca"), model("abc")
    adapt_(one, config, dtype=torch.float32, generator=seeded(1))
    adapt_(two, config, dtype=torch.float32, generator=seeded(1))
    adapt_(other, config, dtype=torch.float32, generator=seeded(2))
    a, b = adapters(one), adapters(two)
    assert set(b) == {"c", "a"}
    for name, module in b.items():
        assert torch.equal(module.lora_A, a[name].lora_A) and not module.lora_B.any()
    assert not torch.equal(a["a"].lora_A, a["c"].lora_A)
    assert not torch.equal(a["a"].lora_A, adapters(other)["a"].lora_A)
    # peft's kaiming_uniform_(a=sqrt(5)) is uniform in +-1/sqrt(in).
    wide = LoraLinear(nn.Linear(100, 3), rank=64, alpha=1.0)
    wide.reset_parameters_("x", generator=seeded())
    assert 0.099 < wide.lora_A.max().item() <= 0.1 and wide.lora_A.mean().abs() < 2e-3


LLAMA = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = tied
    return LlamaForCausalLM(config)


def test_adapters_made_on_meta_equal_those_on_a_loaded_model() -> None:
    """The order of the main path: quantise and adapt on meta, then load, then initialise."""
    spec, config = format_spec(Quant(format="nf4")), Adapter(kind="dora", rank=2)
    source = llama()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    quantize_(source, spec, kernels="eager")
    adapt_(source, config, dtype=torch.float32, generator=seeded(5))

    with torch.device("meta"):
        model = llama()
    quantize_(model, spec, kernels="eager")
    summary = adapt_(model, config, dtype=torch.float32, generator=seeded(5))
    model.to_empty(device="cpu")
    for name, value in state.items():
        module, leaf = locate(model, name)
        if isinstance(module, QuantLinear) and leaf == "weight":
            module.load_(value)
        else:
            module.get_parameter(leaf).data.copy_(value)
    reset_parameters_(model, generator=seeded(5))
    finish_loading_(model)
    assert set(adapters(model)) == set(summary.targets)
    wanted = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert parameter.requires_grad == (".lora_" in name or name.endswith("magnitude"))
    with pytest.raises(KeyError):
        locate(model, "model.layers.7.mlp.up_proj.weight")


def tiny_models() -> dict[str, PreTrainedModel]:
    small = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "llama": llama(),
        "bloom": BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=48)),
        "phi": PhiForCausalLM(PhiConfig(**small, intermediate_size=48)),
        "classifier": LlamaForSequenceClassification(LLAMA),
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_targets_are_those_that_peft_takes() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    def theirs(model: PreTrainedModel, targets: str | list[str], task: str) -> set[str]:
        built = get_peft_model(
            copy.deepcopy(model), LoraConfig(target_modules=targets, task_type=task)
        )
        found = {n for n, m in built.named_modules() if isinstance(m, LoraLayer)}
        return {name.removeprefix("base_model.model.") for name in found}

    for name, model in tiny_models().items():
        task = "SEQ_CLS" if name == "classifier" else "CAUSAL_LM"
        assert set(target_names(model, ["all-linear"])) == theirs(model, "all-linear", task), name
    model = llama()
    regex = r".*layers\.1\.self_attn\.[qv]_proj"
    assert set(target_names(model, [regex])) == theirs(model, regex, "CAUSAL_LM")
    for names in (["q_proj", "down_proj"], ["layers.0.mlp.up_proj"], ["lm_head"]):
        assert set(target_names(model, names)) == theirs(model, names, "CAUSAL_LM")
    bloom = tiny_models()["bloom"]
    assert target_names(bloom, ["query_key_value"]) == [
        f"transformer.h.{i}.self_attention.query_key_value" for i in range(2)
    ]


def test_targets_that_mean_nothing_are_refused_with_what_there_is() -> None:
    model = llama()
    for targets, message in (
        (("q_prj",), r"'q_prj' names no linear layer; nearest: q_proj"),
        (("q_proj", "query_key_value"), r"'query_key_value' names no linear layer"),
        (("embed_tokens",), r"'embed_tokens' names no linear layer"),
        (("q_proj[",), r"regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(model, Adapter(kind="lora", targets=targets))
    with pytest.raises(ConfigError, match="every target lies within modules_to_save"):
        adapt(model, Adapter(kind="lora", targets=("q_proj",), modules_to_save=("self_attn",)))


def adapt(model: nn.Module, config: Adapter) -> dict[str, nn.Parameter]:
    """Adapt and return what is trained."""
    adapt_(model, config, dtype=torch.float32, generator=seeded())
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_modules_to_save_are_trained_and_ties_refused() -> None:
    config = Adapter(kind="lora", targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    trained = adapt(llama(), config)
    assert {n for n in trained if "lora" not in n} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    lone = config.model_copy(update={"modules_to_save": ("embed_tokens",)})
    with pytest.raises(
        ConfigError, match=r"embed_tokens shares its weight with lm_head; name them"
    ):
        adapt(llama(tied=True), lone)
    assert "model.embed_tokens.weight" in adapt(llama(tied=True), config)
    typo = config.model_copy(update={"modules_to_save": ("embed_token",)})
    with pytest.raises(
        ConfigError, match=r"modules_to_save: 'embed_token' names no module; nearest"
    ):
        adapt(llama(), typo)
    quantised = llama()
    quantize_(quantised, format_spec(Quant(format="nf4")), kernels="eager")
    inside = config.model_copy(update={"modules_to_save": ("v_proj",)})
    with pytest.raises(ConfigError, match=r"v_proj is quantised .* add v_proj to quant.keep"):
        adapt(quantised, inside)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save_in_fp32_beside_a_bf16_model(tied: bool) -> None:
    """Full copies are kept in the adapter's type; the model still computes in its own."""
    model = llama(tied=tied).to(torch.bfloat16)
    ids = torch.arange(12).view(2, 6)
    before = model(input_ids=ids).logits
    trained = adapt(
        model,
        Adapter(kind="lora", targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head")),
    )
    assert {p.dtype for p in trained.values()} == {torch.float32}
    after = model(input_ids=ids).logits
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before)
    after.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


def test_a_classification_head_is_always_trained() -> None:
    model = LlamaForSequenceClassification(LLAMA)
    trained = adapt(model, Adapter(kind="lora", rank=2))
    assert {n for n in trained if "lora" not in n} == {"score.weight"}
    assert not any("score" in name for name in adapters(model))


def test_counts_are_those_of_the_dense_model() -> None:
    expected = sum(p.numel() for p in llama().parameters())
    for section in (Quant(), Quant(format="nf4"), Quant(format="ternary")):
        model = llama()
        quantize_(model, format_spec(section), kernels="eager")
        summary = adapt_(
            model,
            Adapter(kind="lora", rank=4, targets=("q_proj",)),
            dtype=torch.float32,
            generator=seeded(),
        )
        assert summary.num_trainable == 2 * 4 * (32 + 32)
        assert summary.num_total == expected + summary.num_trainable
        assert summary.targets == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))


def test_bloom_7b1_counts_as_published() -> None:
    config = BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    model.tie_weights()
    quantize_(model, format_spec(Quant(format="int8")))
    summary = adapt_(
        model,
        Adapter(kind="lora", rank=8, targets=("query_key_value",)),
        dtype=torch.float32,
        generator=seeded(),
    )
    assert (summary.num_trainable, summary.num_total) == (3_932_160, 7_072_948_224)


def test_training_the_base_itself() -> None:
    model = llama().requires_grad_(False)
    assert set(adapt(model, Adapter())) == {name for name, _ in model.named_parameters()}
    quantize_(model, format_spec(Quant(format="nf4")), kernels="eager")
    with pytest.raises(
        ConfigError, match=r"kind=none trains the base itself, but .* are quantised"
    ):
        adapt(model, Adapter())


def test_a_few_steps_learn_and_leave_the_base_alone() -> None:
    """End to end on a quantised tiny model: the loss falls, packed tensors keep every bit."""
    for kind in ("lora", "dora"):
        torch.manual_seed(0)
        model = llama()
        model.lm_head.weight.data.mul_(20)  # a head as it is made can tell no token from another
        quantize_(model, format_spec(Quant(format="nf4")), kernels="eager")
        trained = adapt(model, Adapter(kind=kind, rank=8, alpha=16))
        frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
        optimizer = torch.optim.AdamW(trained.values(), lr=2e-2)
        ids = torch.randint(0, 48, (2, 12))
        losses = []
        for _ in range(25):
            loss = F.cross_entropy(
                model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], kind
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], value) for name, value in frozen.items())
