"""Recorded passes without a GPU: when something is recorded, where it reads and writes, and what
happens when it cannot be. A recording here is the work itself, done again on the same tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from graph_models import (
    VOCAB,
    Case,
    FakeRecorder,
    Seen,
    distance,
    make_batch,
    make_model,
    train,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nibble.data import Batch
from nibble.data.shapes import of_few_shapes
from nibble.errors import ConfigError
from nibble.models.family import describe
from nibble.nn.attention import PACKED, attention_name
from nibble.place.graphs import Observed, recorder_of
from nibble.place.single import one_device
from nibble.spec.config import Place, Recipe
from nibble.spec.graphs import wish
from nibble.spec.rules import check
from nibble.train import graphs
from nibble.train.graphs import MAX_GRAPHS, Passes, StaticGrads
from nibble.use.objective import objective


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    made = FakeRecorder()
    monkeypatch.setattr(graphs, "recorder_of", lambda place, model: made)
    return made


CASES = {
    "nf4 lora": Case(),
    "answers": Case(answers=True, accumulation=3),
    "packed": Case(packed=True, rows=2, length=64),
    "packed answers, recomputed": Case(packed=True, answers=True, policy="full", length=64),
    "selective": Case(packed=True, policy="selective", keep_blocks=1, length=64),
    "rows of many lengths": Case(ragged=True, length=64, answers=True),
    "full training": Case(quant="none", adapter="none", accumulation=1),
    "int8 dora": Case(quant="int8", adapter="dora"),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_passes_give_the_gradients_of_eager_ones(
    name: str, tmp_path: Path, fake: FakeRecorder
) -> None:
    case = CASES[name]
    eager = train(case, tmp_path / "eager", graphs="off")
    assert fake.num_recorded == 0
    recorded = train(case, tmp_path / "graphs", graphs="on")
    assert fake.num_replayed >= case.accumulation * (case.steps - 3)
    assert 1 <= fake.num_recorded <= 3
    assert fake.num_observed <= 2
    assert distance(eager, recorded) < 1e-4
    for key, value in eager.weights.items():
        # AdamW's first updates are signs: where a gradient is noise, so is its sign.
        assert (value - recorded.weights[key]).norm() <= 1e-3 * value.norm() + 1e-6


def test_a_run_that_goes_on_is_the_run_that_never_stopped(
    tmp_path: Path, fake: FakeRecorder
) -> None:
    case = Case(packed=True, length=64, steps=6)
    straight = train(case, tmp_path / "a", graphs="on")
    train(case, tmp_path / "b", graphs="on", max_steps=3)
    resumed = train(case, tmp_path / "b", graphs="on", resume=True)
    for key, value in straight.weights.items():
        assert torch.equal(value, resumed.weights[key]), key
    assert {s: straight.losses[s] for s in (4, 5, 6)} == resumed.losses


def a_model() -> tuple[nn.Parameter, Callable[[Batch, Tensor, Tensor], Tensor], list[int]]:
    """A parameter, work on it, and the addresses that the work saw."""
    weight = nn.Parameter(torch.ones(200, 3))
    seen: list[int] = []

    def work(batch: Batch, count: Tensor, scale: Tensor) -> Tensor:
        seen.append(batch.input_ids.data_ptr())
        loss = weight[batch.input_ids].pow(2).sum() / count
        torch.autograd.backward(loss * scale)
        return loss.detach()

    return weight, work, seen


def passes(fake: FakeRecorder, **words: Any) -> tuple[Passes, nn.Parameter, list[int], list[str]]:
    weight, work, seen = a_model()
    notes: list[str] = []
    made = Passes(
        work,
        place=one_device(Place(device="cpu")),
        parameters=[weight],
        recorder=fake,
        note=notes.append,
        **words,
    )
    return made, weight, seen, notes


def step(made: Passes, weight: nn.Parameter, batch: Batch, *, num: int = 1) -> Tensor:
    """One update of plain descent from `num` passes; returns the gradient."""
    for index in range(num):
        made.run(batch, num_targets=7, scale=2.0, last=index == num - 1)
    assert weight.grad is not None
    grad = weight.grad.clone()
    weight.grad = None
    made.end_step()
    return grad


def test_a_shape_is_recorded_after_its_warm_up_and_the_first_update() -> None:
    fake = FakeRecorder()
    made, weight, seen, notes = passes(fake)
    step(made, weight, make_batch(Case(), 0), num=4)
    assert fake.num_recorded == 0, "the optimiser has no memory yet"
    for seed in range(1, 4):
        step(made, weight, make_batch(Case(), seed))
        assert (fake.num_recorded, fake.num_replayed) == (1, seed)
    assert len(set(seen[-3:])) == 1, "inputs lie where they lay"
    assert len(notes) == 1 and notes[0].startswith("micro-batches of 2x32 run as a CUDA graph")


def test_gradients_have_one_address_and_begin_at_zero() -> None:
    fake = FakeRecorder()
    made, weight, _, _ = passes(fake)
    addresses = set()
    for seed in range(6):
        batch = make_batch(Case(), seed)
        made.run(batch, num_targets=7, scale=2.0, last=True)
        assert weight.grad is not None
        expected = torch.zeros(200).index_add_(
            0, batch.input_ids.flatten(), torch.full((64,), 4 / 7)
        )
        torch.testing.assert_close(weight.grad, expected[:, None].expand(-1, 3))
        if fake.num_replayed:
            addresses.add(weight.grad.data_ptr())
        weight.grad = None
        made.end_step()
    assert fake.num_replayed == 4 and len(addresses) == 1


def test_eager_and_recorded_passes_of_one_step_add_up() -> None:
    fake = FakeRecorder()
    made, weight, _, _ = passes(fake)
    known, other = make_batch(Case(), 1), make_batch(Case(length=40), 2)
    for _ in range(3):
        step(made, weight, known)
    alone = step(made, weight, known)
    made.run(other, num_targets=7, scale=2.0, last=False)
    assert weight.grad is not None
    first = weight.grad.clone()
    made.run(known, num_targets=7, scale=2.0, last=False)
    made.run(other, num_targets=7, scale=2.0, last=True)
    torch.testing.assert_close(weight.grad, 2 * first + alone)


@pytest.mark.parametrize(
    ("waits", "said"), [("a/b.py:3", r"waits .* \(a/b.py:3\)"), (None, "from here on")]
)
def test_work_that_waits_is_not_recorded(waits: str | None, said: str) -> None:
    fake = FakeRecorder()
    fake.observed = Observed(waits=waits)
    made, weight, _, notes = passes(fake)
    grads = [step(made, weight, make_batch(Case(), 1)) for _ in range(5)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert len(notes) == 1 and re.search(said, notes[0]), notes
    assert fake.num_recorded == (1 if waits is None else 0)


def test_further_shapes_are_recorded_without_an_eager_pass() -> None:
    fake = FakeRecorder()
    made, weight, seen, _ = passes(fake)
    for _ in range(3):
        step(made, weight, make_batch(Case(), 1))
    assert (fake.num_observed, fake.num_recorded, fake.num_replayed) == (1, 1, 1)
    for length in (40, 48, 56):
        step(made, weight, make_batch(Case(length=length), 2), num=2)
    assert (fake.num_observed, fake.num_recorded, fake.num_replayed) == (1, 4, 7)
    assert len(seen) == 2 + 7, "a pass is eager or replayed, never both"


def test_a_failed_recording_leaves_the_pass_eager_and_whole() -> None:
    fake = FakeRecorder()
    fake.refusal = "the device has no memory left for it"
    made, weight, _, notes = passes(fake)
    grads = [step(made, weight, make_batch(Case(), 1), num=2) for _ in range(4)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert notes == [
        "no CUDA graph for micro-batches of 2x32: the device has no memory left for it"
    ]


def test_the_number_of_graphs_is_bounded() -> None:
    fake = FakeRecorder()
    made, weight, _, notes = passes(fake)
    for _ in range(2):
        step(made, weight, make_batch(Case(rows=1), 1))
    for rows in range(1, MAX_GRAPHS + 3):
        step(made, weight, make_batch(Case(rows=rows), rows))
    assert made.num_graphs == fake.num_recorded == fake.num_replayed == MAX_GRAPHS
    assert sum("others" in note for note in notes) == 1
    fake.room_bytes = 0
    step(made, weight, make_batch(Case(rows=40), 1))
    assert made.num_graphs == 0 and fake.num_released == 1, "an eager pass needs their memory"


def recorded_and_refusing(**words: Any) -> tuple[FakeRecorder, Passes, nn.Parameter, list[str]]:
    """Passes of which one shape is recorded, and no other will be."""
    fake = FakeRecorder()
    made, weight, _, notes = passes(fake, **words)
    for _ in range(3):
        step(made, weight, make_batch(Case(), 1))
    fake.refusal = "the device has no memory left for it"
    return fake, made, weight, notes


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("num_before", [0, 2])
def test_memory_that_runs_out_beside_graphs_takes_them_back(where: str, num_before: int) -> None:
    fake, made, weight, notes = recorded_and_refusing()
    known, longer = make_batch(Case(), 1), make_batch(Case(length=48), 3)
    alone, other = step(made, weight, known), step(made, weight, longer)
    expected = num_before * alone + other
    work = made._work

    def scarce(batch: Batch, count: Tensor, scale: Tensor) -> Tensor:
        if made.num_graphs and batch.input_ids.shape == longer.input_ids.shape:
            if where == "backward":
                work(batch, count, scale)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(batch, count, scale)

    made._work = scarce
    for _ in range(num_before):
        made.run(known, num_targets=7, scale=2.0, last=False)
    grad = step(made, weight, longer)
    assert made.num_graphs == 0 and fake.num_released == 1
    torch.testing.assert_close(grad, expected)
    assert torch.equal(step(made, weight, known), alone)
    assert "given up" in notes[-1] and not made.release()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_too_large_for_a_second_copy_are_counted_once(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAD_BYTES", 0)
    _, made, weight, _ = recorded_and_refusing()
    known, longer = make_batch(Case(), 1), make_batch(Case(length=48), 3)
    alone, other = step(made, weight, known), step(made, weight, longer)
    work = made._work

    def scarce(batch: Batch, count: Tensor, scale: Tensor) -> Tensor:
        if made.num_graphs and batch.input_ids.shape == longer.input_ids.shape:
            if where == "backward":
                work(batch, count, scale)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(batch, count, scale)

    made._work = scarce
    made.run(known, num_targets=7, scale=2.0, last=False)
    if where == "backward":
        with pytest.raises(torch.OutOfMemoryError):
            step(made, weight, longer)
        return
    torch.testing.assert_close(step(made, weight, longer), alone + other)
    assert made.num_graphs == 0


def test_memory_that_runs_out_twice_is_an_error() -> None:
    _, made, weight, _ = recorded_and_refusing()

    def scarce(*unused: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    made._work = scarce
    with pytest.raises(torch.OutOfMemoryError):
        step(made, weight, make_batch(Case(length=48), 3))
    assert made.num_graphs == 0


def test_no_memory_for_static_gradients_leaves_the_pass_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*unused: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StaticGrads, "add", full)
    made, weight, _, notes = passes(FakeRecorder())
    grads = [step(made, weight, make_batch(Case(), 1)) for _ in range(4)]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert made.num_graphs == 0 and "no memory left for its gradients" in notes[0]


def test_hooks_of_the_placement_run_after_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from nibble.place.single import Single

    fake = FakeRecorder()
    made, weight, _, _ = passes(fake)
    told: list[tuple[str, bool]] = []

    @contextmanager
    def micro_batch(self: Single, *, last: bool) -> Any:
        told.append(("replays" if fake.num_replayed else "eager", last))
        yield

    monkeypatch.setattr(Single, "micro_batch", micro_batch)
    for _ in range(2):
        step(made, weight, make_batch(Case(), 1), num=2)
    assert told == [("eager", False), ("eager", True), ("replays", True)]
    assert fake.num_replayed == 2


def test_static_gradients_are_aligned_views_of_a_buffer() -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (3, 130, 5)]
    params[1].grad = torch.full((130,), 2.0)
    held = StaticGrads()
    held.add(params[:2])
    held.add(params)
    held.attach_()
    assert all(p.grad is not None and p.grad.data_ptr() % 64 == 0 for p in params)
    assert [float(p.grad.sum()) for p in params if p.grad is not None] == [0, 260, 0]
    for parameter in params:
        parameter.grad = None
    held.attach_()
    assert all(p.grad is not None and not p.grad.any() for p in params)


def test_on_a_cpu_nothing_is_recorded(tmp_path: Path) -> None:
    case = replace(Case(), steps=2)
    model = make_model(case)
    assert recorder_of(one_device(Place(device="cpu")), model) == ""
    seen: Seen = train(case, tmp_path, graphs="on")
    assert not any("graph" in note for note in seen.notes)


def test_the_attention_becomes_the_one_that_takes_offsets(
    fake: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(Case())
    notes: list[str] = []
    words = {"place": one_device(Place(device="cpu")), "parameters": [], "note": notes.append}
    work = a_model()[1]
    assert graphs.passes_of(model, work, wish="off", **words) is None
    assert model.config._attn_implementation != PACKED
    assert graphs.passes_of(model, work, wish="on", **words) is not None
    assert model.config._attn_implementation == PACKED
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert graphs.passes_of(model, work, wish="on", **words) is None
    assert len(notes) == 1 and notes[0].startswith("no CUDA graphs: masks of its attention")


class Watch(TorchDispatchMode):
    """Lists operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Bloom"])
def test_passes_of_families_read_nothing_from_the_device(family: str, window: int | None) -> None:
    words = {**SIZES, **({"head_dim": 16} if family == "Qwen3" else {})}
    if window is not None and family not in ("Mistral", "Phi3"):
        pytest.skip("no window")
    if family in ("Mistral", "Phi3"):
        words["sliding_window"] = window
    if family == "Bloom":
        words = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**words)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    name = attention_name(type(model), config)
    loss = objective(describe(model), task="causal-lm", chunk=32)
    batch = make_batch(Case(length=24), 0)
    expected = loss(model, batch)
    if name == PACKED:
        model.set_attn_implementation(PACKED)
    shaped = of_few_shapes(batch, offsets=name == PACKED)
    assert (shaped.offsets is None) == (family == "Bloom")
    loss(model, shaped).backward()
    with Watch() as watch:
        found = loss(model, shaped)
        found.backward()
    # A window is a loop over rows on a CPU, one kernel on a GPU.
    assert watch.found == [] or (window and set(watch.found) == {"_local_scalar_dense"})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"place": {"device": "cpu"}}, "place.device=cpu"),
        ({"place": {"kind": "fsdp"}}, "place.kind=fsdp"),
        ({"train": {"activation_offload": True}}, "train.activation_offload"),
        ({"optim": {"method": "galore", "layerwise": True}}, "optim.layerwise"),
        ({"adapter": {"kind": "lora", "dropout": 0.1}}, "adapter.dropout=0.1 and"),
        ({"model": {"path": "x", "task": "classification"}}, "model.task=classification"),
    ],
)
def test_recipes_that_cannot_be_recorded(words: dict[str, Any], said: str) -> None:
    base: dict[str, Any] = {"model": {"path": "x"}, **words}
    assert wish(Recipe.model_validate(base)) == "off"
    demanded = {**base, "train": {**base.get("train", {}), "cuda_graphs": True}}
    with pytest.raises(ConfigError, match=f"train.cuda_graphs=true with {said}"):
        check(Recipe.model_validate(demanded))


def test_what_a_recipe_wishes() -> None:
    for value, expected in (("auto", "off"), (True, "on"), (False, "off")):
        recipe = Recipe.model_validate({"model": {"path": "x"}, "train": {"cuda_graphs": value}})
        check(recipe)
        assert wish(recipe) == expected
