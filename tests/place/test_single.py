"""One device: filled exactly, capped, and honest about what it lacks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.errors import PlacementError, WeightError
from nibble.nn.adapters import adapt_, finish_loading_, reset_parameters_
from nibble.nn.quant import PackedWeight, QuantLinear, quantize_
from nibble.numerics.formats import pack
from nibble.place.activations import Activations, Recomputed
from nibble.place.base import host_peak_bytes, out_of_memory_is_explained
from nibble.place.devices import begin_context, bf16_slowdown, pick_device
from nibble.place.single import Single, one_device
from nibble.spec.config import Adapter, Place, Quant
from nibble.spec.formats import format_spec
from nibble.spec.hardware import SLOW_BF16


def tiny(*, tied: bool = True) -> Any:
    """A Llama on meta, and what a build gives along with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from nibble.models.family import describe

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return SimpleNamespace(model=model, family=describe(model), config=config)


def truth(config: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def fill(place: Single, model: nn.Module, reference: nn.Module) -> None:
    for name, value in reference.named_parameters():
        place.load(model, name, value.detach())


@pytest.mark.parametrize("tied", [True, False])
def test_a_filled_model_computes_what_the_checkpoint_does(tied: bool) -> None:
    built = tiny(tied=tied)
    reference = truth(built.config)
    place = one_device(Place(device="cpu"))
    model = place.arrange(built, activations=Activations(policy="full"))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(isinstance(b.forward, Recomputed) for _, b in built.family.blocks(model))
    fill(place, model, reference)
    place.check_loaded(model)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model.eval()(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_weights_are_packed_on_arrival_through_adapters() -> None:
    built = tiny()
    spec = format_spec(Quant(format="nf4"))
    assert spec is not None
    names = quantize_(built.model, spec)
    generator = torch.Generator().manual_seed(0)
    adapt_(built.model, Adapter(kind="lora", rank=2), dtype=torch.float32, generator=generator)
    place = one_device(Place(device="cpu"))
    model = place.arrange(built, activations=Activations(policy="none"))
    reference = truth(built.config)
    fill(place, model, reference)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    with pytest.raises(WeightError, match=r"lora_A and \d+ others are not in the checkpoint"):
        place.check_loaded(model, initialised=[])
    reset_parameters_(model, generator=generator)
    finish_loading_(model)
    place.check_loaded(model, initialised=adapters)
    for name in names:
        held = model.get_submodule(f"{name}.base")
        assert isinstance(held, QuantLinear)
        expected = pack(spec, reference.get_submodule(name).weight.detach())
        for leaf, tensor in held.packed().items():
            assert torch.equal(tensor, expected[leaf])


def test_packed_weights_are_taken_verbatim_and_only_where_they_fit() -> None:
    built = tiny()
    spec = format_spec(Quant(format="nf4"))
    assert spec is not None
    quantize_(built.model, spec, keep=("down_proj",))
    place = one_device(Place(device="cpu"))
    model = place.arrange(built, activations=Activations(policy="none"))
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    packed = PackedWeight(spec=spec, tensors=pack(spec, weight))
    place.load(model, "model.layers.0.self_attn.q_proj.weight", packed)
    held = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(held.get_parameter("codes"), packed.tensors["codes"])
    with pytest.raises(WeightError, match=r"down_proj.weight is stored as nf4 but stays in 16 bit"):
        place.load(model, "model.layers.0.mlp.down_proj.weight", packed)


def test_every_tensor_comes_exactly_once() -> None:
    built = tiny()
    reference = truth(built.config)
    place = one_device(Place(device="cpu"))
    model = place.arrange(built, activations=Activations(policy="none"))
    norm = "model.norm.weight"
    for name, value in reference.named_parameters():
        if name != norm:
            place.load(model, name, value.detach())
    with pytest.raises(WeightError, match=r"model.norm.weight is not in the checkpoint"):
        place.check_loaded(model)
    place.load(model, norm, torch.ones(32))
    with pytest.raises(WeightError, match=r"model\.norm\.weight comes twice"):
        place.load(model, norm, torch.ones(32))
    for name in ("model.norm.bias", "model.layers.7.input_layernorm.weight"):
        with pytest.raises(WeightError, match="but not in the model"):
            place.load(model, name, torch.ones(32))
    other = tiny()
    model = place.arrange(other, activations=Activations(policy="none"))
    with pytest.raises(WeightError, match=r"has shape \[31\] in the checkpoint and \[32\] in the"):
        place.load(model, norm, torch.ones(31))


def test_values_take_the_type_of_the_model() -> None:
    built = tiny()
    built.model.to(torch.bfloat16)
    place = one_device(Place(device="cpu"))
    model = place.arrange(built, activations=Activations(policy="none"))
    value = torch.randn(32, generator=torch.Generator().manual_seed(0))
    place.load(model, "model.norm.weight", value)
    held = model.get_parameter("model.norm.weight")
    assert held.dtype == torch.bfloat16 and torch.equal(held, value.bfloat16())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("word", ["cuda", "cuda:0", "cuda:3"])
def test_a_gpu_that_is_not_there_is_one_line(word: str) -> None:
    with pytest.raises(PlacementError, match=rf"place.device={word}, but .*use place.device=cpu"):
        one_device(Place(device=word))
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("word", ["gpu", "cuda:x", "mps", "cpu:0"])
def test_a_word_that_is_no_device_is_told_which_are(word: str) -> None:
    with pytest.raises(PlacementError, match="take auto, cpu, cuda or cuda:N"):
        pick_device(word)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of "
                "79.11 GiB of which 3.44 MiB is free. 24.00 GiB allowed; Of the allocated memory"
            ),
            "out of GPU memory: 2.50 GiB more were asked for, 24.00 GiB are allowed; halve it",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "out of host memory: 68719476736 bytes more were asked for; halve it",
        ),
        (MemoryError(), "out of host memory: an allocation failed; halve it"),
    ],
)
def test_out_of_memory_is_one_line_with_advice(error: Exception, line: str) -> None:
    with pytest.raises(PlacementError) as told, out_of_memory_is_explained("halve it"):
        raise error
    assert str(told.value) == line


def test_a_real_allocation_that_fails_is_explained_and_a_bug_is_not() -> None:
    line = r"out of host memory: \d+ bytes more were asked for"
    with pytest.raises(PlacementError, match=line), out_of_memory_is_explained("use less"):
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="size"), out_of_memory_is_explained("use less"):
        torch.ones(2) + torch.ones(3)


def test_one_process_has_nothing_to_add() -> None:
    place = one_device(Place(device="cpu"))
    value: Tensor = torch.arange(3.0)
    assert place.sum(value) is value and (place.rank, place.world) == (0, 1)
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert place.clip_([parameter], 1.0).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert place.memory().host_bytes == host_peak_bytes() > 10 * 2**20
    batch = Batch(
        input_ids=torch.zeros(1, 2, dtype=torch.long),
        labels=torch.zeros(1, 2, dtype=torch.long),
        position_ids=None,
        attention_mask=None,
        num_targets=2,
        num_tokens=2,
        doc_lengths=((2,),),
    )
    assert place.batch(batch) is batch


def test_the_peak_of_host_memory_is_in_bytes() -> None:
    before = host_peak_bytes()
    status = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    assert abs(high - before) < 64 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_cap_is_enforced_and_explained() -> None:
    place = one_device(Place(device="cuda", vram="1GiB"))
    try:
        held = torch.empty(600 << 20, dtype=torch.uint8, device=place.device)
        line = r"out of GPU memory: .* asked for, (1.00 GiB|1024.00 MiB) are allowed; use less"
        with pytest.raises(PlacementError, match=line), out_of_memory_is_explained("use less"):
            torch.empty(600 << 20, dtype=torch.uint8, device=place.device)
        assert place.memory().reserved_bytes >= held.numel()
        del held
        place.reset_memory()
        assert place.memory().reserved_bytes < 100 << 20
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)
    with pytest.raises(PlacementError, match=r"place.vram=.* but cuda:0 has"):
        one_device(Place(device="cuda", vram="4000GiB"))
    with pytest.raises(PlacementError, match="the last GPU is"):
        one_device(Place(device="cuda:77"))


def test_a_context_that_cannot_begin_says_nothing() -> None:
    begun = threading.active_count()
    begin_context(torch.device("cpu"))
    assert threading.active_count() == begun
    begin_context(torch.device("cuda", torch.cuda.device_count()))  # one that is not there
    for thread in threading.enumerate():
        if thread.name == "nibble-context":
            thread.join(60)  # what it raises is an error of the test


def test_the_slowdown_of_bf16_is_that_of_a_large_product() -> None:
    """Where small products are not slow, large ones are not either, and the other way round."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(x, x)
            times.append(time.perf_counter() - start)
        return min(times)

    large = seconds(torch.bfloat16) / seconds(torch.float32)
    assert (bf16_slowdown() < SLOW_BF16) == (large < SLOW_BF16)
