"""Runs of a small Llama through the loop, eagerly or with recorded passes, for tests of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from loop_fakes import Recorder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nibble.data import IGNORE, Batch
from nibble.models.family import describe
from nibble.nn.adapters import adapt_, adapters
from nibble.nn.fused import fuse_
from nibble.nn.quant import quantize_
from nibble.optim import build
from nibble.place.activations import Activations, checkpoint_
from nibble.place.base import Placement
from nibble.place.graphs import NotRecordedError, Observed, Recorded
from nibble.place.single import one_device
from nibble.spec.config import Adapter, Optim, Place, Quant
from nibble.spec.formats import format_spec
from nibble.train.checkpoint import Checkpoints
from nibble.train.loop import Settings, loop
from nibble.train.report import Report
from nibble.train.state import TrainState
from nibble.use.objective import held_out_loss, objective

VOCAB = 200


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and on which rows."""

    quant: str = "nf4"
    adapter: str = "lora"
    policy: str = "none"
    keep_blocks: int = 0
    dropout: float = 0.0
    packed: bool = False
    rows: int = 2
    length: int = 32
    accumulation: int = 2
    hidden: int = 64
    num_layers: int = 3
    steps: int = 5
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    ragged: bool = False
    """Rows that are not packed have other lengths in every batch."""
    answers: bool = False
    """Only some positions have a target, and how many differs."""


@dataclass
class Seen:
    """What a run left."""

    losses: dict[int, float] = field(default_factory=dict)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peak_bytes: int = 0


def make_batch(case: Case, seed: int) -> Batch:
    """Random tokens in rows of one document, or of some that fill a row almost."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    length = case.length - (random(0, case.length // 4) if case.ragged else 0)
    lengths = tuple((length,) for _ in range(case.rows))
    if case.packed:
        length -= random(0, max(1, case.length // 32))
        cuts = [sorted({0, length, *(random(1, length) for _ in range(4))}) for _ in lengths]
        lengths = tuple(tuple(b - a for a, b in pairwise(c)) for c in cuts)
    ids = torch.randint(0, VOCAB, (case.rows, length), generator=generator)
    labels = ids.roll(-1, dims=1)
    positions = torch.stack([torch.cat([torch.arange(n) for n in one]) for one in lengths])
    labels[positions.roll(-1, dims=1) == 0] = IGNORE
    if case.answers:
        labels[torch.rand(labels.shape, generator=generator) < 0.2 + 0.1 * (seed % 3)] = IGNORE
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions if case.packed else None,
        attention_mask=None,
        num_targets=int((labels != IGNORE).sum()),
        num_tokens=ids.numel(),
        doc_lengths=lengths,
    )


class Steps:
    """Other rows in every step; which ones is a function of the position."""

    def __init__(self, case: Case, *, rank: int = 0, world: int = 1) -> None:
        self.case, self.position = case, 0
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            self.position += 1
            first = self.position * self.case.accumulation * self.world + self.rank
            numbers = range(first, first + self.case.accumulation * self.world, self.world)
            yield [make_batch(self.case, number) for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def make_model(case: Case) -> Any:
    """The same weights for the same case."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        num_hidden_layers=case.num_layers,
        num_attention_heads=max(1, case.hidden // 64),
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(device=case.device, dtype=case.dtype)
    quantize_(model, format_spec(Quant(format=case.quant)))  # type: ignore[arg-type]
    adapt_(
        model,
        Adapter(kind=case.adapter, rank=4, dropout=case.dropout),  # type: ignore[arg-type]
        dtype=torch.float32 if case.adapter != "none" else case.dtype,
        generator=torch.Generator().manual_seed(0),
    )
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.02)
    fuse_(model, model.model, dtype=case.dtype)
    settings = Activations(policy=case.policy, keep_blocks=case.keep_blocks)
    checkpoint_(list(model.model.layers), settings)
    return model


def train(
    case: Case,
    folder: Path,
    *,
    graphs: str,
    resume: bool = False,
    place: Placement | None = None,
    **words: Any,
) -> Seen:
    """Train a fresh model as the case says; `resume`: go on where the folder is."""
    place = place or one_device(Place(device=case.device))
    model = make_model(case)
    trained = place.trained(model)
    optimizer, schedule = build(trained, Optim(learning_rate=1e-4), total_steps=case.steps)
    seen = Seen()

    def keep(*unused: object) -> None:
        seen.grads.append([p.grad.clone() for p in trained.values() if p.grad is not None])

    optimizer.register_step_pre_hook(keep)
    loader = Steps(case, rank=place.rank, world=place.world)
    state = TrainState(
        model=model, optimizer=optimizer, schedule=schedule, loader=loader, place=place
    )
    checkpoints = Checkpoints(folder, keep=3)
    if resume:
        assert checkpoints.resume(state) is not None
    torch.manual_seed(7 + state.step)
    loss = objective(describe(model), task="causal-lm", chunk=48)
    held_out = [make_batch(case, 1000)]
    recorder = Recorder()
    settings = Settings(
        **{"max_steps": case.steps, "steps_per_epoch": 10.0, "eval_every": 2, "graphs": graphs,
           **words}
    )  # fmt: skip
    place.reset_memory()
    loop(
        state,
        place=place,
        objective=loss,
        settings=settings,
        report=Report([recorder]),
        checkpoints=checkpoints,
        evaluate=lambda stop: held_out_loss(
            model, held_out, place=place, objective=loss, stop=stop
        ),
    )
    seen.losses, seen.eval_losses = recorder.losses, recorder.eval_losses
    seen.notes, seen.peak_bytes = recorder.notes, place.memory().reserved_bytes
    seen.weights = {name: p.detach().clone() for name, p in trained.items()}
    return seen


class FakeRecorder:
    """Records by remembering: a replay is the work itself, done again on the same tensors."""

    def __init__(self) -> None:
        self.observed = Observed(waits=None)
        self.num_observed = self.num_recorded = self.num_replayed = self.num_released = 0
        self.refusal = ""
        self.room_bytes = 1 << 40

    def observe(self, work: Callable[[], Any]) -> tuple[Any, Observed]:
        self.num_observed += 1
        return work(), self.observed

    def has_room(self, num_bytes: int) -> bool:
        return num_bytes <= self.room_bytes

    def record(self, work: Callable[[], None]) -> Recorded:
        if self.refusal:
            raise NotRecordedError(self.refusal)
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            work()

        return Recorded(replay=replay, num_bytes=1 << 20)

    def release(self) -> None:
        self.num_released += 1


def distance(one: Seen, other: Seen) -> float:
    """The largest relative difference of losses and of gradients."""
    assert one.losses.keys() == other.losses.keys() and len(one.grads) == len(other.grads)
    far = [abs(one.losses[s] - other.losses[s]) / abs(one.losses[s]) for s in one.losses]
    far += [
        abs(a[1] - b[1]) / abs(a[1])
        for a, b in zip(one.eval_losses, other.eval_losses, strict=True)
    ]
    for mine, theirs in zip(one.grads, other.grads, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            far.append(float((a - b).norm() / a.norm().clamp(min=1e-8)))
    return max(far)
