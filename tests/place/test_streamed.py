"""Streamed blocks compute what resident ones do, bit for bit, whatever is asked of the ring."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nibble.errors import PlacementError, WeightError
from nibble.nn.adapters import adapt_, adapters, finish_loading_, reset_parameters_
from nibble.nn.quant import quantize_
from nibble.place import placement
from nibble.place.activations import Activations
from nibble.place.group import Group
from nibble.place.host_memory import HostMemory, check_host_memory
from nibble.place.stream import Stream
from nibble.place.streamed import num_resident_blocks, resident_positions
from nibble.spec.config import Adapter, Place, Quant
from nibble.spec.formats import format_spec

NUM_BLOCKS = 6
CPU = torch.device("cpu")


def tiny(family: str = "llama") -> Any:
    import transformers as t

    from nibble.models.family import describe

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": NUM_BLOCKS,
             "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    config: Any = t.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)
    if family == "mixtral":
        config = t.MixtralConfig(
            **sizes, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1
        )
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(config)
    return SimpleNamespace(model=model, family=describe(model), config=config)


def reference_weights(config: Any) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return {name: value.detach() for name, value in model.named_parameters()}


def filled(
    place: Any,
    *,
    quant: str,
    adapter: str,
    policy: str,
    family: str = "llama",
    keep: Any = (),
    more: Any = None,
) -> nn.Module:
    """A model in its place, through the calls that `use.assemble.fill` makes."""
    built = tiny(family)
    block = None if quant in ("none", "int8") else 16
    spec = format_spec(Quant(format=quant, block=block))  # type: ignore[arg-type]
    quantize_(built.model, spec, keep=keep)
    generator = torch.Generator().manual_seed(0)
    words = Adapter(kind=adapter, rank=2, dropout=0.1 if policy == "none" else 0.0)  # type: ignore[arg-type]
    adapt_(built.model, words, dtype=torch.float32, generator=generator)
    model = place.arrange(built, activations=Activations(policy=policy, **(more or {})))
    for name, value in reference_weights(built.config).items():
        rows = place.rows(model, name)
        if rows is None or value[rows].numel():
            place.load(model, name, value)
    reset_parameters_(model, generator=generator)
    for part in place.parts(model):
        finish_loading_(part)
    fresh = [p for a in adapters(model).values() for p in a.parameters(recurse=False)]
    place.check_loaded(model, initialised=fresh)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(5)
        for name, parameter in place.trained(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=noise))
    return model


def run(
    place: Any, model: nn.Module, *, accumulation: int = 1, steps: int = 2, share: int = 1
) -> dict[str, Any]:
    """Losses and every gradient of some steps of plain descent, with an evaluation in between;
    this process adds 1 / share of the loss."""
    found: dict[str, Any] = {}
    torch.manual_seed(1)
    trained = place.trained(model)
    for step in range(steps):
        model.train()
        for number in range(accumulation):
            ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(number))
            ids = ids.to(place.device)
            with place.micro_batch(last=number == accumulation - 1):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss / share).backward()
                found[f"loss {step} {number}"] = loss.detach()
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            found[f"grad {step} {name}"] = parameter.grad.clone()
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
            model.eval()
            for _ in range(2):
                found[f"logits {step}"] = model(input_ids=ids, use_cache=False).logits
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, other[key]), key


@pytest.fixture
def streams() -> Iterator[Any]:
    made: list[Stream] = []

    def make(*, poison: bool = True, **words: Any) -> Stream:
        place = Stream(Place(kind="stream", device="cpu", **words), Group.alone(CPU))
        place.poison = poison
        made.append(place)
        return place

    yield make
    for place in made:
        place.close()


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8", "hqq"])
def test_every_gradient_is_that_of_the_resident_run(
    quant: str, adapter: str, policy: str, streams: Any
) -> None:
    single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
    words = {"quant": quant, "adapter": adapter, "policy": policy}
    expected = run(single, filled(single, **words), accumulation=3)
    place = streams(ring_blocks=2)
    same(run(place, filled(place, **words), accumulation=3), expected)


RINGS = [(2, 0), (3, 0), (4, 0), (2, 1), (3, 3), (2, 5), (4, 5), (3, NUM_BLOCKS), (2, "auto")]


@pytest.mark.parametrize(("ring", "resident"), RINGS)
@pytest.mark.parametrize("poison", [False, True])
def test_ring_and_residents_change_nothing(
    ring: int, resident: Any, poison: bool, streams: Any
) -> None:
    words = {"quant": "nf4", "adapter": "lora", "policy": "full"}
    single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
    expected = run(single, filled(single, **words))
    place = streams(ring_blocks=ring, resident_blocks=resident, poison=poison)
    model = filled(place, **words)
    assert len(place.blocks.resident) == (0 if resident == "auto" else resident)
    same(run(place, model), expected)
    # Without poison nothing is copied that is here already.
    if not poison and resident == 0:
        before = place.blocks.ring.num_copies
        with place.micro_batch(last=True):
            model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        first = place.blocks.ring.num_copies
        with place.micro_batch(last=True):
            model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        assert place.blocks.ring.num_copies - first == 2 * (NUM_BLOCKS - ring)
        assert first >= before


def test_what_is_not_packed_is_streamed_too(streams: Any) -> None:
    """Experts are stacks of matrices that autograd keeps; some linears stay in 16 bit."""
    words = {"quant": "nf4", "adapter": "lora", "family": "mixtral", "keep": ("experts", "k_proj")}
    for policy in ("none", "full"):
        single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
        expected = run(single, filled(single, **words, policy=policy))
        place = streams(ring_blocks=2)
        model = filled(place, **words, policy=policy)
        leaves = {piece.leaf for piece in place.blocks.layouts[0].pieces}
        assert {"codes", "weight", "gate_up_proj"} <= leaves
        same(run(place, model), expected)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize(
    ("policy", "more"),
    [("selective", {}), ("full", {"keep_blocks": 2}), ("full", {"offload": True}),
     ("selective", {"offload": True, "keep_blocks": 1})],
)  # fmt: skip
def test_what_is_kept_of_activations_does_not_matter(
    quant: str, policy: str, more: dict[str, Any], streams: Any
) -> None:
    words = {"quant": quant, "adapter": "lora"}
    single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
    expected = run(single, filled(single, **words, policy="full"))
    place = streams(ring_blocks=2)
    same(run(place, filled(place, **words, policy=policy, more=more)), expected)


def test_an_aborted_step_leaves_a_usable_ring(streams: Any) -> None:
    words = {"quant": "nf4", "adapter": "lora", "policy": "full"}
    single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
    expected = run(single, filled(single, **words))
    place = streams(ring_blocks=2)
    model = filled(place, **words)
    ids = torch.ones(1, 4, dtype=torch.long)
    for number, where in ((4, "forward"), (2, "backward")):
        layer = model.get_submodule(f"model.layers.{number}.mlp.down_proj.base")

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        if where == "forward":
            handle: Any = layer.register_forward_hook(fail)
        else:
            norm = model.get_submodule(f"model.layers.{number}.input_layernorm")
            handle = norm.register_full_backward_hook(fail)
        with pytest.raises(KeyboardInterrupt), place.micro_batch(last=True):
            model(input_ids=ids, use_cache=False).logits.sum().backward()
        handle.remove()
        assert place.blocks.ring.taken is None
        model.zero_grad(set_to_none=True)
    same(run(place, model), expected)


def test_what_is_away_is_seen_in_host_memory(streams: Any) -> None:
    single = placement(Place(kind="single", device="cpu"), Group.alone(CPU))
    whole = filled(single, quant="nf4", adapter="lora", policy="none").state_dict()
    place = streams(resident_blocks=2)
    model = filled(place, quant="nf4", adapter="lora", policy="none")
    state = model.state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)
    first = place.host.bytes.data_ptr()
    inside = range(first, first + place.host.bytes.numel())
    away = [n for n, p in model.named_parameters() if p.data_ptr() in inside and p.numel()]
    assert len(away) == (NUM_BLOCKS - 2) * 7 * 4
    base = sum(block.num_bytes for block in place.blocks.layouts)
    assert base <= place.host.bytes.numel() <= base + 4096 * NUM_BLOCKS


def test_a_matrix_that_never_came_is_named(streams: Any) -> None:
    built = tiny()
    quantize_(built.model, format_spec(Quant(format="nf4", block=16)))
    adapt_(built.model, Adapter(kind="lora"), dtype=torch.float32, generator=torch.Generator())
    place = streams()
    model = place.arrange(built, activations=Activations(policy="full"))
    missing = "model.layers.3.mlp.up_proj.weight"
    for name, value in reference_weights(built.config).items():
        if name != missing:
            place.load(model, name, value)
    fresh = [p for a in adapters(model).values() for p in a.parameters(recurse=False)]
    with pytest.raises(WeightError, match=r"model\.layers\.3\.mlp\.up_proj\.base\.codes and 3"):
        place.check_loaded(model, initialised=fresh)
    with pytest.raises(WeightError, match="comes twice"):
        place.load(model, "model.layers.0.mlp.up_proj.weight", torch.zeros(64, 32))


def test_a_model_that_is_trained_whole_is_refused(streams: Any) -> None:
    built = tiny()
    adapt_(built.model, Adapter(), dtype=torch.float32, generator=torch.Generator())
    with pytest.raises(PlacementError, match=r"nothing frozen .* use place.kind=fsdp"):
        streams().arrange(built, activations=Activations(policy="none"))


def test_residents_are_spread_and_counted() -> None:
    for num_blocks in range(1, 20):
        for resident in range(num_blocks + 1):
            kept = resident_positions(num_blocks, resident)
            assert len(kept) == resident
            away = [b for b in range(num_blocks) if b not in kept]
            gaps = [b - a for a, b in itertools.pairwise(away)]
            assert not gaps or max(gaps) - min(gaps) <= 1
    assert num_resident_blocks(10, block_bytes=3, num_blocks=8) == 3
    assert num_resident_blocks(-10, block_bytes=3, num_blocks=8) == 0
    assert num_resident_blocks(99, block_bytes=3, num_blocks=8) == 8


def test_memory_is_one_file_that_nobody_can_find_later(tmp_path: Path) -> None:
    first = HostMemory.create(10_000)
    second = HostMemory.attach(first.path, 10_000)
    first.bytes.copy_(torch.arange(10_000).to(torch.uint8))
    assert torch.equal(first.bytes, second.bytes)
    first.close()
    second.bytes[3] = 99
    assert first.bytes[3] == 99
    second.close()
    with pytest.raises(PlacementError, match="could not be shared"):
        HostMemory.attach(first.path, 10_000)
    named = HostMemory.create(10_000, folder=tmp_path)
    other = HostMemory.attach(named.path, 10_000)
    named.forget()
    other.bytes[7] = 5
    assert named.bytes[7] == 5 and not list(tmp_path.iterdir())
    named.close()
    other.close()


def test_too_little_host_memory_is_refused_with_numbers() -> None:
    gib = 1 << 30
    with pytest.raises(PlacementError, match=r"take 30.00 GiB .* beside 3.00 GiB .* is 32.00 GiB"):
        check_host_memory(30 * gib, other_bytes=3 * gib, budget_bytes=32 * gib)
    with pytest.raises(PlacementError, match=r"take 9,?000.00 GiB .* and [\d.]+ GiB are free"):
        check_host_memory(9000 * gib, other_bytes=0, budget_bytes=None)
    check_host_memory(gib >> 4, other_bytes=0, budget_bytes=gib)
