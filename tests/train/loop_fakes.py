"""A model, a loader and a report small enough to see through, for tests of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.nn.loss import IGNORE, causal_lm_loss
from nibble.optim import build
from nibble.place.single import one_device
from nibble.spec.config import Optim, Place
from nibble.train.checkpoint import Checkpoints
from nibble.train.loop import Outcome, Settings, loop
from nibble.train.report import Report
from nibble.train.state import LossScaler, TrainState

VOCAB, DIM, LENGTH = 37, 16, 12


class TinyModel(nn.Module):
    """Embedding, one hidden layer, dropout, head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.inner = nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.drop(torch.tanh(self.inner(self.embed(ids))))
        return hidden


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    return causal_lm_loss(model(batch.input_ids), batch.labels, model.head, chunk=16)[0]


def as_batch(ids: Tensor, labels: Tensor, mask: Tensor) -> Batch:
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=None,
        attention_mask=mask,
        num_targets=int((labels != IGNORE).sum()),
        num_tokens=int(mask.sum()),
        doc_lengths=tuple((int(n),) for n in mask.sum(1)),
    )


def make_batch(rows: int, *, seed: int) -> Batch:
    """Rows with very different numbers of targets and some padding."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, LENGTH), generator=gen)
    labels = (ids * 5 + 3) % VOCAB  # something that can be learnt
    keep = torch.randint(1, LENGTH, (rows, 1), generator=gen)
    labels = labels.masked_fill(torch.arange(LENGTH) >= keep, IGNORE)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return as_batch(ids, labels, mask)


def pieces(batch: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    """The rows of a batch as several batches."""
    assert batch.attention_mask is not None
    parts = [torch.split(t, sizes) for t in (batch.input_ids, batch.labels, batch.attention_mask)]
    return [as_batch(*part) for part in zip(*parts, strict=True)]


class FakeLoader:
    """Endless steps; which batch comes is a function of the position."""

    def __init__(self, sizes: tuple[int, ...] = (2, 1)) -> None:
        self.sizes = sizes
        self.position = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            self.position += 1
            yield pieces(make_batch(sum(self.sizes), seed=self.position), self.sizes)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class Recorder:
    """A sink that remembers."""

    name = "recorder"
    every_step = True

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.notes: list[str] = []
        self.phases: list[tuple[str, int, int | None, bool]] = []

    def begin(self, *, first_step: int, max_steps: int) -> None:
        pass

    def metrics(self, values: Mapping[str, float]) -> None:
        self.values.append(dict(values))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def phase(
        self, name: str, done: int, total: int | None, elapsed_s: float, *, ended: bool
    ) -> None:
        self.phases.append((name, done, total, ended))

    def close(self) -> None:
        pass

    @property
    def losses(self) -> dict[int, float]:
        return {int(v["step"]): v["loss"] for v in self.values if "loss" in v}

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        return [(int(v["step"]), v["eval_loss"]) for v in self.values if "eval_loss" in v]


def make_state(
    *,
    optim: Optim | None = None,
    sizes: tuple[int, ...] = (2, 1),
    dropout: float = 0.0,
    seed: int = 0,
    fp16: bool = False,
    total_steps: int = 6,
) -> TrainState:
    torch.manual_seed(seed)
    model = TinyModel(dropout)
    words = optim or Optim(learning_rate=1e-2, weight_decay=0.01, warmup_steps=2)
    optimizer, schedule = build(dict(model.named_parameters()), words, total_steps=total_steps)
    return TrainState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        loader=FakeLoader(sizes),
        scaler=LossScaler(enabled=fp16),
    )


def run(state: TrainState, folder: Path, **words: Any) -> tuple[Outcome, Recorder]:
    """Train with defaults that a test overrides: settings by name, or parts of the loop."""
    recorder = Recorder()
    parts = {k: words.pop(k) for k in ("objective", "evaluate", "profiler") if k in words}
    keep = words.pop("keep", 2)
    settings = Settings(**{"max_steps": 6, "steps_per_epoch": 3.0, **words})
    outcome = loop(
        state,
        place=one_device(Place(device="cpu")),
        settings=settings,
        report=Report([recorder]),
        checkpoints=Checkpoints(folder, keep=keep),
        **{"objective": next_token, **parts},
    )
    return outcome, recorder
