"""The plan's bytes against real tensors, its advice against itself, its speed against a record."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from nibble.errors import ConfigError, PlanError
from nibble.nn.adapters import adapt_
from nibble.nn.expand import expand_
from nibble.nn.factorised import factorise_
from nibble.nn.quant import QuantLinear, quantize_
from nibble.optim import build
from nibble.optim.projected_grad import ProjectedGrad
from nibble.spec.advice import Advice, Limits, _first_fit, advise, advise_host, apply
from nibble.spec.arch import Architecture, from_config
from nibble.spec.choices import CHOICES, Choice, Setting, differs, override, refusal_of
from nibble.spec.config import MethodName, Recipe
from nibble.spec.formats import format_spec
from nibble.spec.hardware import hardware
from nibble.spec.holdings import ONE_DEVICE, Devices
from nibble.spec.inventory import inventory
from nibble.spec.names import covers, lineage, meets
from nibble.spec.phases import CATEGORIES, PHASES
from nibble.spec.plan import Plan, plan
from nibble.spec.plan_text import HEADS, plain
from nibble.spec.units import GIB

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": {"path": "m"}, **sections})


def meta_model(name: str, words: dict[str, Any], *, labels: int | None = None) -> nn.Module:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    from nibble.models.conv1d import replace_conv1d_

    config = AutoConfig.for_model(name, **words)
    auto = AutoModelForCausalLM
    if labels is not None:
        config.num_labels = labels
        auto = AutoModelForSequenceClassification
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=torch.bfloat16)
    replace_conv1d_(model)
    return model


def real(model: nn.Module, r: Recipe) -> tuple[int, int, int, int, int]:
    """Bytes of codes, other packed tensors, frozen and trained weights of a model made for `r`."""
    spec = format_spec(r.quant)
    expansion = None
    keep = list(r.quant.keep)
    if r.adapter.kind == "expand":
        expansion = expand_(model, model.model.layers, r.adapter.num_new_blocks)  # type: ignore
        keep += expansion.names
    quantize_(model, spec, keep=keep)
    dtype = torch.bfloat16 if r.train.adapter_precision == "bf16" else torch.float32
    summary = adapt_(
        model, r.adapter, dtype=dtype, generator=torch.Generator(), expansion=expansion
    )
    codes = scales = frozen = trained = 0
    packed = {
        id(p) for m in model.modules() if isinstance(m, QuantLinear) for p in m.packed().values()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained += parameter.nbytes
        elif id(parameter) in packed:
            codes += parameter.nbytes if name.endswith("codes") else 0
            scales += 0 if name.endswith("codes") else parameter.nbytes
        else:
            frozen += parameter.nbytes
    assert summary.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return codes, scales, frozen, trained, summary.num_total


FORMATS: list[dict[str, Any]] = [
    {"format": "none"},
    {"format": "nf4"},
    {"format": "nf4", "double_quant": False, "block": 32},
    {"format": "fp4"},
    {"format": "int8"},
    {"format": "ternary"},
    *({"format": "hqq", "bits": bits} for bits in (1, 2, 3, 4, 8)),
    {"format": "nf4", "keep": ["q_proj", "mlp"]},
]
ADAPTERS: list[dict[str, Any]] = [
    {"kind": "lora", "rank": 4},
    {"kind": "dora", "rank": 3, "targets": ["q_proj", ".*down_proj"]},
    {"kind": "lora", "modules_to_save": ["embed_tokens", "lm_head"]},
    {"kind": "expand", "num_new_blocks": 1},
]


def compare(model: nn.Module, shape: Architecture, r: Recipe) -> None:
    stock = inventory(r, shape)
    planned = (
        stock.base_codes_bytes,
        stock.base_scales_bytes,
        stock.base_weights_bytes,
        stock.trained_bytes,
        stock.num_total,
    )
    assert planned == real(model, r)


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: "-".join(str(v) for v in q.values()))
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: a["kind"])
def test_weights_are_priced_to_the_byte(quant: dict[str, Any], adapter: dict[str, Any]) -> None:
    compare(
        meta_model("llama", TINY),
        from_config({"model_type": "llama", **TINY}),
        recipe(quant=quant, adapter=adapter),
    )


def test_every_format_is_priced() -> None:
    from nibble.numerics.formats import CODECS

    assert {row["format"] for row in FORMATS} - {"none"} == set(CODECS)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt_neox", "phi", "gemma3_text", "qwen2"])
def test_families_are_priced_to_the_byte(name: str, precision: str) -> None:
    """Tied heads, Conv1D, biases, fused projections; adapters in bf16 as well."""
    r = recipe(
        quant={"format": "nf4"},
        adapter={"kind": "lora", "rank": 2},
        train={"adapter_precision": "bf16", "precision": precision},
    )
    model = meta_model(name, TINY)
    if precision == "fp32":
        model = model.float()
    compare(model, from_config({"model_type": name, **TINY}), r)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_classifiers_are_priced_to_the_byte(name: str, quant: str) -> None:
    r = recipe(
        model={"path": "m", "task": "classification"},
        quant={"format": quant},
        adapter={"kind": "lora", "rank": 2},
    )
    shape = from_config({"model_type": name, **TINY}, num_labels=3)
    compare(meta_model(name, TINY, labels=3), shape, r)


def test_full_training_is_priced_to_the_byte() -> None:
    model = meta_model("llama", TINY)
    stock = inventory(recipe(), from_config({"model_type": "llama", **TINY}))
    assert stock.trained_bytes == sum(p.nbytes for p in model.parameters())
    assert stock.base_bytes == 0


def test_a_mixture_is_refused_or_kept() -> None:
    words = {**TINY, "num_local_experts": 4}
    shape = from_config({"model_type": "mixtral", **words})
    r = recipe(quant={"format": "nf4"}, adapter={"kind": "lora"})
    with pytest.raises(ConfigError, match="stacks of experts"):
        inventory(r, shape)
    kept = recipe(quant={"format": "nf4", "keep": ["experts"]}, adapter={"kind": "lora"})
    compare(meta_model("mixtral", words), shape, kept)


METHODS = {name: {} if name == "apollo-mini" else {"rank": 8} for name in MethodName.__args__}
LOW_RANK: list[dict[str, Any]] = [
    *({"method": name, **rank} for name, rank in METHODS.items() if name != "none"),
    {"rank": 4, "side": "full", "basis_storage": "int8", "name": "lion"},
    {"rank": 4, "side": "reverse_std", "basis_storage": "bf16", "name": "adafactor"},
    {"rank": 65, "method": "galore", "targets": ["down_proj", "lm_head"]},
]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("side", ["std", "full"])
def test_layer_wise_gradients_are_priced_to_the_byte(precision: str, side: str) -> None:
    words = {**TINY, "hidden_size": 96}
    r = recipe(
        optim={"method": "galore", "rank": 8, "layerwise": True, "stagger": False, "side": side},
        train={"precision": precision},
    )
    stock = inventory(r, from_config({"model_type": "llama", **words}))
    model = meta_model("llama", words).to(
        getattr(torch, "float32" if precision == "fp32" else "bfloat16")
    )
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    build(dict(model.named_parameters()), r.optim, total_steps=9)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # the second step begins with real bases
    whole = sum(p.grad.nbytes for p in model.parameters() if type(p.grad) is torch.Tensor)
    small = [p.grad for p in model.parameters() if isinstance(p.grad, ProjectedGrad)]
    sketches = sum(s.nbytes for grad in small for s in grad.sketches.values())
    assert stock.gradient_bytes == whole + sum(grad.small.nbytes for grad in small)
    largest = max(p.nbytes for p in model.parameters() if isinstance(p.grad, ProjectedGrad))
    assert sketches > 0 and stock.passing_gradient_bytes == sketches + largest


def test_steps_in_backward_leave_the_gradients_of_vectors() -> None:
    words = {"method": "galore", "rank": 8, "layerwise": True, "in_backward": True}
    r = recipe(optim={**words, "max_grad_norm": None})
    stock = inventory(r, from_config({"model_type": "llama", **TINY}))
    model = meta_model("llama", TINY).to(torch.bfloat16)
    vectors = [p for p in model.parameters() if p.dim() == 1]
    assert stock.gradient_bytes == sum(p.nbytes for p in vectors)
    assert stock.passing_gradient_bytes >= max(p.nbytes for p in model.parameters())


def test_factors_take_the_place_of_their_weights() -> None:
    r = recipe(
        model={"path": "m", "from_scratch": True},
        adapter={"kind": "factorised", "rank": 4, "targets": ["q_proj", ".*mlp.*proj"]},
    )
    model = meta_model("llama", TINY)
    factorise_(model, r.adapter.targets, rank=4)
    stock = inventory(r, from_config({"model_type": "llama", **TINY}))
    assert stock.num_total == stock.num_trainable == sum(p.numel() for p in model.parameters())
    assert stock.trained_bytes == sum(p.nbytes for p in model.parameters())
    assert stock.base_bytes == 0


def test_a_7b_layer_by_layer_saves_gradients_and_states() -> None:
    """arXiv 2403.03507, table 3: 7B in bf16 with 8-bit states at rank 1024."""
    llama = {
        "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 11008,
    }  # fmt: skip
    shape = from_config({"model_type": "llama", **llama})
    words: dict[str, Any] = {"data": {"max_length": 256}, "train": {"micro_batch_size": 16}}
    full = plan(recipe(optim={"name": "adamw8bit"}, **words), architecture=shape)
    galore = plan(
        recipe(
            optim={
                "method": "galore8bit",
                "rank": 1024,
                "layerwise": True,
                "basis_storage": "bf16",
            },
            **words,
        ),
        architecture=shape,
    )
    assert full.device_bytes > 38 * GIB
    assert 19 * GIB < galore.device_bytes < 27 * GIB
    bases, states = 1.69 * GIB, 3.61 * GIB
    assert galore.peak.device["optimizer_state"] == pytest.approx(bases + states, rel=0.01)


@pytest.mark.parametrize(
    "optim",
    [
        {"name": "adamw"},
        {"name": "adamw8bit"},
        {"name": "sgd"},
        {"name": "sgd", "momentum": 0.9},
        {"name": "adafactor"},
        {"name": "adafactor-momentum", "state": "bf16"},
        {"name": "lion", "state": "8bit"},
        *LOW_RANK,
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_optimiser_state_is_priced_to_the_byte(optim: dict[str, Any]) -> None:
    words = {**TINY, "hidden_size": 96, "num_hidden_layers": 1}
    r = recipe(optim=optim, train={"precision": "fp32"})
    stock = inventory(r, from_config({"model_type": "llama", **words}))
    model = meta_model("llama", words).float().to_empty(device="cpu")
    built = build(dict(model.named_parameters()), r.optim, total_steps=2)
    optimizer = built[0] if isinstance(built, tuple) else built
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    # Of what is not projected, no tensor of one element is kept; a residual's norm is one.
    assert stock.optimizer_bytes == sum(v.nbytes for v in states)


def test_bloom_7b1_counts_as_published() -> None:
    words = {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}
    r = recipe(
        quant={"format": "int8"},
        adapter={"kind": "lora", "rank": 8, "targets": ["query_key_value"], "dropout": 0.05},
    )
    shape = from_config({"model_type": "bloom", **words})
    made = plan(r, architecture=shape)
    assert made.num_trainable == 3_932_160
    assert made.num_total == 7_069_016_064 + 3_932_160
    compare(meta_model("bloom", words), shape, r)


def test_words_mean_the_same_modules_as_in_the_model() -> None:
    names = [n for n, _ in meta_model("gpt_neox", TINY).named_modules() if n]
    for pattern in ("dense", "attention.dense", ".*h_to_4h", "layers.1", "gpt_neox", "x"):
        for name in names:
            whole = name == pattern or name.endswith(f".{pattern}")
            assert meets(pattern, name) == (whole or bool(re.fullmatch(pattern, name)))
            inside = any(meets(pattern, part) for part in lineage(name))
            assert covers([pattern], name) == inside
    with pytest.raises(ConfigError, match="neither a module name nor"):
        meets("(", "a")
    with pytest.raises(ConfigError, match=r"'q_prj' names no linear layer; there are .*q_proj"):
        inventory(
            recipe(adapter={"kind": "lora", "targets": ["q_prj"]}),
            from_config({"model_type": "llama", **TINY}),
        )


QLORA = {
    "quant": {"format": "nf4"},
    "adapter": {"kind": "lora", "rank": 16},
    "optim": {"name": "adamw8bit"},
}


def test_phases_add_up_and_name_their_peak() -> None:
    made = plan(recipe(**QLORA), architecture=from_config(LLAMA_8B))
    assert tuple(phase.name for phase in made.phases) == PHASES
    for phase in made.phases:
        assert set(phase.device) <= set(CATEGORIES)
        assert all(v > 0 for v in phase.device.values())
        assert phase.device_bytes == sum(phase.device.values())
    assert made.device_bytes == max(p.device_bytes for p in made.phases)
    first, steady = made.phases[1], made.phases[2]
    assert steady.device_bytes >= first.device_bytes
    assert json.loads(json.dumps(made.to_json()))["phases"]["load"]["device"]["base_codes"]


def test_more_work_never_needs_less() -> None:
    shape = from_config(LLAMA_8B)

    def peak(**sections: Any) -> int:
        return plan(recipe(**{**QLORA, **sections}), architecture=shape).device_bytes

    sizes = [peak(train={"micro_batch_size": n}) for n in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    lengths = [peak(data={"max_length": n}) for n in (256, 1024, 4096)]
    assert lengths == sorted(lengths)
    none = peak(train={"activation_checkpointing": "none", "micro_batch_size": 4})
    assert none > peak(train={"micro_batch_size": 4})
    assert peak(quant={"format": "int8"}) > peak()


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    card = hardware("rtx4090")
    r = recipe(adapter={"kind": "lora"}, data={"max_length": 3072}, train={"micro_batch_size": 8})
    made = plan(r, architecture=from_config(LLAMA_8B), hardware=card)
    assert not made.fits()
    with pytest.raises(PlanError) as raised:
        made.check()
    message = str(raised.value)
    assert "budget is 23.99 GiB" in message and "\n" not in message
    assert "train.micro_batch_size=4 train.gradient_accumulation_steps=2" in message
    assert "place.kind=stream (" in message and "quant.format=int8 (" in message
    for advice in advise(made, card.memory_bytes):
        again = plan(apply(r, advice.overrides), architecture=from_config(LLAMA_8B), hardware=card)
        assert again.device_bytes == advice.bytes <= card.memory_bytes
        again.check()


def test_changes_are_piled_up_and_none_is_idle() -> None:
    card = hardware("rtx4090")
    shape = from_config(LLAMA_8B)
    r = recipe(
        data={"max_length": 2048},
        train={"activation_checkpointing": "none", "micro_batch_size": 8},
    )
    made = plan(r, architecture=shape, hardware=card)
    (advice,) = advise(made, card.memory_bytes)
    assert len(advice.overrides) > 1
    setting = Setting(architecture=shape, devices=made.devices, on_cpu=False)
    groups = [
        {k for k in values if k in advice.overrides}
        for choice in CHOICES
        for values in list(choice.values(r, setting))[-1:]
    ]
    for group in groups:
        fewer = {k: v for k, v in advice.overrides.items() if k not in group}
        if not group or refusal_of(r, override(r, fewer)) is not None:
            continue
        other = plan(apply(r, fewer), architecture=shape, hardware=card)
        assert not other.fits(), group
    with pytest.raises(PlanError, match="No small change would fit"):
        made.check(GIB)


def test_advice_covers_what_can_be_chosen() -> None:
    """Each row of the table is proposed where it alone makes a plan fit, with its own bytes."""
    shape = from_config(LLAMA_8B)
    lora = recipe(
        adapter={"kind": "lora", "rank": 256},
        data={"max_length": 4096},
        train={"micro_batch_size": 4, "activation_checkpointing": "full", "keep_blocks": 8},
        place={"kind": "stream", "resident_blocks": 32},
    )
    full = recipe(data={"max_length": 2048}, optim={"name": "adamw"})
    two = Devices(per_machine=2)
    seen: set[str] = set()
    for r, devices in ((lora, ONE_DEVICE), (full, ONE_DEVICE), (full, two)):
        made = plan(r, architecture=shape, hardware=hardware("h200"), devices=devices)
        for choice in CHOICES:
            setting = Setting(architecture=shape, devices=devices, on_cpu=False)
            for values in choice.values(r, setting):
                changed = override(r, values)
                if not differs(r, values) or refusal_of(r, changed) is not None:
                    continue
                there = plan(changed, architecture=shape, devices=devices)
                if there.device_bytes < made.device_bytes:
                    (only,) = [a for a in [_alone(made, choice, there.device_bytes)] if a]
                    assert only.bytes <= there.device_bytes
                    seen.add(choice.name)
    wanted = {"kept blocks", "resident blocks", "micro-batch", "loss chunk", "offload", "MLP tile"}
    assert wanted | {"placement", "states", "format", "method", "rank", "length", "adapter"} == seen


def _alone(made: Plan, choice: Choice, limit: int) -> Advice | None:
    return _first_fit(made, [], choice, Limits(device_bytes=limit))


def test_host_memory_that_will_not_do_is_answered_too() -> None:
    shape = from_config(LLAMA_8B)
    r = recipe(
        adapter={"kind": "lora"}, place={"kind": "stream", "ram": "12GiB"},
        data={"max_length": 2048}, train={"activation_offload": True},
    )  # fmt: skip
    made = plan(r, architecture=shape, hardware=hardware("rtx4090"))
    with pytest.raises(PlanError) as raised:
        made.check_host()
    message = str(raised.value)
    assert "of host memory" in message and "would fit: place.kind=auto (" in message
    for advice in advise_host(made, 12 * GIB):
        again = plan(apply(r, advice.overrides), architecture=shape, hardware=hardware("rtx4090"))
        assert again.host_bytes == advice.bytes <= 12 * GIB and again.fits()
    with pytest.raises(PlanError, match=r"take fewer devices, or raise place\.ram"):
        made.check_host(GIB)


def test_the_recipes_cap_is_one_on_the_allocator() -> None:
    r = recipe(**QLORA, place={"vram": "24GiB"})
    made = plan(r, architecture=from_config(LLAMA_8B), hardware=hardware("h200"))
    assert made.limit() == 24 * GIB + made.phases[0].device["cuda_context"]
    assert made.allocator_bytes == made.device_bytes - made.phases[0].device["cuda_context"]
    with pytest.raises(PlanError, match=r"budget is 4\.75 GiB"):
        plan(recipe(**QLORA, place={"vram": "4GiB"}), architecture=from_config(LLAMA_8B)).check()


def test_on_a_cpu_everything_is_host_memory() -> None:
    made = plan(recipe(**QLORA, place={"device": "cpu"}), architecture=from_config(LLAMA_8B))
    assert made.on_cpu and made.limit() is None and made.speed is None
    assert "cuda_context" not in made.peak.device
    assert made.host_bytes > made.device_bytes
    made.check()
    with pytest.raises(PlanError):
        made.check(2 * GIB)


def test_flops_follow_what_is_trained() -> None:
    shape = from_config(LLAMA_8B)
    tokens = 1024
    small = replace(shape, tied=False)
    full = plan(recipe(train={"activation_checkpointing": "none"}), architecture=small)
    assert full.flops_per_step == pytest.approx(
        6 * (shape.matmul_size + shape.head_size) * tokens
        + 3.5 * shape.attention_flops_per_token(tokens) * tokens
    )
    frozen = plan(recipe(**QLORA, train={"activation_checkpointing": "none"}), architecture=small)
    assert frozen.flops_per_step < 0.72 * full.flops_per_step


def test_cost_needs_a_price() -> None:
    shape = from_config(LLAMA_8B)
    speed = plan(recipe(**QLORA), architecture=shape, hardware=hardware("h200")).speed
    assert speed is not None
    price = hardware("h200").price_usd_hour
    assert price is not None
    assert speed.cost_usd(1e6) == pytest.approx(1e6 / speed.tokens_per_s / 3600 * price)
    other = plan(recipe(**QLORA), architecture=shape, hardware=hardware("t4")).speed
    assert other is not None and other.cost_usd(1e6) is None


def test_the_table_says_all_of_it() -> None:
    made = plan(
        recipe(**QLORA, place={"vram": "5.5GiB"}),
        architecture=from_config(LLAMA_8B),
        hardware=hardware("h200"),
    )
    text = plain(made)
    assert max(len(line) for line in text.splitlines()) <= 80
    for phase in PHASES:
        assert HEADS.get(phase, phase) in text
    for category, words in CATEGORIES.items():
        assert (words in text) == any(category in phase.device for phase in made.phases)
    assert "41,943,040 trainable of 8,072,204,288 parameters (0.52 %)" in text
    assert "does not fit into 6.25 GiB" in " ".join(text.split()) and "tokens/s on h200" in text
    roomy = plain(plan(recipe(**QLORA), architecture=from_config(LLAMA_8B)))
    assert "no budget is named" in " ".join(roomy.split())


def test_planning_takes_no_torch_and_little_time() -> None:
    import subprocess
    import sys

    code = (
        "import sys, time\n"
        "from nibble.spec.config import Recipe\n"
        "from nibble.spec.arch import from_config\n"
        "from nibble.spec.plan import plan\n"
        "from nibble.spec.plan_text import HEADS, plain\n"
        f"shape = from_config({LLAMA_8B!r})\n"
        "start = time.perf_counter()\n"
        "plain(plan(Recipe(model={'path': 'm'}), architecture=shape))\n"
        "assert time.perf_counter() - start < 1.0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'}\n"
        "assert not set(sys.modules) & heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
