"""The loop. One, for every format, adapter, optimiser and placement.

    loss of a step = sum over all targets of all its micro-batches / number of those targets

so every target weighs the same and k micro-batches give the gradient of one large batch, however
unevenly the targets lie. Each micro-batch's sum is divided by the step's count before backward:
nothing is rescaled afterwards.

A step: forward and backward of each micro-batch, un-scale (fp16), clip, update, learning rate.
Around it: held-out loss before the first step, every `eval_every` and after the last; a checkpoint
every `save_every`, at the end and when interrupted. The host reads from the device once a logged
step (fp16 once a step, to know whether to skip it). A loss or gradient that is not finite ends the
run before anything is saved, so the last checkpoint on the disk is a good one.

With several processes each step begins with one message between the hosts: targets and tokens of
the step, and whether somebody was asked to stop. So all divide by the same number, and all stop
after the same step. The loss is summed on the devices, so every process sees the same one and comes
to the same end by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nibble.data import Batch
from nibble.errors import TrainingError
from nibble.optim import Optimizer
from nibble.place.base import Placement
from nibble.spec.graphs import Wish
from nibble.train.checkpoint import Checkpoints, all_finite
from nibble.train.graphs import passes_of
from nibble.train.interrupt import Interrupt
from nibble.train.metrics import Meter, StepResult
from nibble.train.phase_memory import EVALUATION, SAVE, PhaseMemory
from nibble.train.profile import Profiler
from nibble.train.report import Report
from nibble.train.state import TrainState
from nibble.use.objective import Objective

MIN_LOSS_SCALE = 1.0
MAX_EXPONENT = 100.0
"""A perplexity above e to this is reported as that."""
Evaluate = Callable[[Callable[[], bool]], float | None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a loop; None turns a thing off. `autocast`: the type to compute in when
    weights are wider.
    """

    max_steps: int
    steps_per_epoch: float
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 1
    autocast: torch.dtype | None = None
    graphs: Wish = "off"
    """Whether micro-batches are to run as CUDA graphs (train/graphs.py)."""
    is_language: bool = False
    """Losses are in nats a token, so that evaluations report perplexity."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a loop ended. Held-out losses are those before the first and after the last step of this
    process.
    """

    step: int
    interrupted: bool
    checkpoint: Path | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    last_loss: float | None


def loop(
    state: TrainState,
    *,
    place: Placement,
    objective: Objective,
    settings: Settings,
    report: Report,
    checkpoints: Checkpoints,
    evaluate: Evaluate | None = None,
    profiler: Profiler | None = None,
    memory: PhaseMemory | None = None,
) -> Outcome:
    """Train until `max_steps`, or until interrupted; the state is saved either way.

    `evaluate(stop)` gives the held-out loss, or None if `stop` told it to leave. `memory` is told
    when phases begin and end. Raises TrainingError at a loss or gradient that is not finite,
    CheckpointError when a checkpoint cannot be written.
    """
    with Interrupt() as interrupt, profiler or Profiler.off() as profile:
        run = _Run(state, place, objective, settings, report, checkpoints, evaluate, interrupt)
        run.memory = memory
        before = run.evaluate_now() if state.step == 0 else None
        after, path = before, checkpoints.latest()
        state.model.train()
        steps = iter(state.loader)
        while state.step < settings.max_steps and not run.stopping:
            profile.before(state.step + 1)
            run.meter.start()
            run.meter.stop(run.step(next(steps)))
            if memory is not None:
                memory.stepped()
            profile.after(state.step)
            last = state.step == settings.max_steps
            if last or state.step % settings.log_every == 0:
                run.log()
            if last or _due(state.step, settings.eval_every):
                after = run.evaluate_now()
            if last or _due(state.step, settings.save_every):
                path = run.save()
        if run.stopping and state.step > 0:
            path = run.save()
        run.log()
    return Outcome(
        step=state.step,
        interrupted=run.stopping and state.step < settings.max_steps,
        checkpoint=path,
        eval_loss_before=before,
        eval_loss_after=after,
        last_loss=run.last_loss,
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@dataclass
class _Run:
    """The parts of one call of `loop`, so that its steps need no arguments."""

    state: TrainState
    place: Placement
    objective: Objective
    settings: Settings
    report: Report
    checkpoints: Checkpoints
    evaluate: Evaluate | None
    interrupt: Interrupt
    last_loss: float | None = None
    memory: PhaseMemory | None = None
    agreed: bool = False
    """All processes know that they are to stop."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.place)
        self.parameters = list(self.state.trained().values())
        if isinstance(self.state.optimizer, Optimizer):
            self.state.optimizer.make_state()
        self.passes = passes_of(
            self.state.model,
            self._work,
            wish=self.settings.graphs,
            place=self.place,
            parameters=self.parameters,
            note=self.report.note,
        )

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One update from the micro-batches of a step."""
        with self.place.during(f"step {self.state.step + 1}"):
            return self._step(batches)

    def _step(self, batches: Sequence[Batch]) -> StepResult:
        state, scaler = self.state, self.state.scaler
        num_targets, num_tokens = self._counts(batches)
        loss = torch.zeros((), device=self.place.device)
        scale = scaler.scale
        for index, batch in enumerate(batches):
            loss += self._pass(batch, num_targets, scale, last=index == len(batches) - 1)
        if scaler.enabled:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(grads, 1.0 / scale)
        norm = self.place.clip_(self.parameters, self.settings.max_grad_norm)
        rate = state.schedule.get_last_lr()[0]
        skipped = scaler.enabled and not math.isfinite(float(norm))
        if not skipped:
            state.optimizer.step()
            state.schedule.step()
        self.place.follow()
        state.optimizer.zero_grad(set_to_none=True)
        if self.passes is not None:
            self.passes.end_step()
        scaler.update(finite=not skipped)
        state.step += 1
        state.num_tokens += num_tokens
        if skipped and scaler.scale < MIN_LOSS_SCALE:
            raise self._not_finite(
                f"gradients of step {state.step} overflow fp16 at any loss scale"
            )
        return StepResult(
            step=state.step,
            epoch=state.step / self.settings.steps_per_epoch,
            loss=self.place.sum(loss),
            grad_norm=norm,
            learning_rate=rate,
            num_targets=num_targets,
            num_tokens=num_tokens,
            loss_scale=scale if scaler.enabled else None,
            skipped=skipped,
        )

    def _pass(self, batch: Batch, num_targets: int, scale: float, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch: its share of the step's loss."""
        if self.passes is not None:
            return self.passes.run(batch, num_targets=num_targets, scale=scale, last=last)
        with self.place.micro_batch(last=last):
            return self._work(self.place.batch(batch), max(num_targets, 1), scale)

    def _work(self, batch: Batch, num_targets: Tensor | float, scale: Tensor | float) -> Tensor:
        """Forward and backward of a batch on the device."""
        with self._autocast():
            part = self.objective(self.state.model, batch) / num_targets
        torch.autograd.backward(part * scale)
        return part.detach()

    def _counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """Targets and tokens of the step over all processes, and on the way who wants to stop."""
        mine = [
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
            int(self.interrupt.requested),
        ]
        num_targets, num_tokens, num_stop = self._sum(mine)
        self.agreed = self.agreed or num_stop > 0
        return num_targets, num_tokens

    def _sum(self, numbers: list[int]) -> list[int]:
        """Sums over all processes, by way of the hosts."""
        if self.place.world == 1:
            return numbers
        sums: list[int] = self.place.sum(torch.tensor(numbers)).tolist()
        return sums

    @property
    def stopping(self) -> bool:
        """Whether all processes are to stop here: with others it takes a message to know."""
        return self.agreed or (self.place.world == 1 and self.interrupt.requested)

    def ask_to_stop(self) -> bool:
        """Ask all processes whether one was told to stop; all must ask at the same place."""
        self.agreed = self.agreed or self._sum([int(self.interrupt.requested)]) != [0]
        return self.agreed

    def _autocast(self) -> AbstractContextManager[object]:
        if self.settings.autocast is None:
            return nullcontext()
        return torch.autocast(self.place.device.type, self.settings.autocast)

    def log(self) -> None:
        """Read the steps since the last time and report them."""
        try:
            read = self.meter.read()
        except TrainingError as error:
            raise self._not_finite(str(error)) from None
        for metrics in read:
            self.last_loss = metrics["loss"]
            self.report.metrics(metrics)

    def evaluate_now(self) -> float | None:
        """Report and return the held-out loss; None without held-out data or when interrupted."""
        if self.evaluate is None:
            return None
        self.log()
        words = f"the evaluation after step {self.state.step}"
        with (
            self.place.during(words),
            self._autocast(),
            self.report.phase("evaluate"),
            self._counted(EVALUATION),
        ):
            loss = self._evaluated(self.evaluate)
        if loss is None:
            return None
        if not math.isfinite(loss):
            raise self._not_finite(f"held-out loss at step {self.state.step} is {loss}")
        told = {"step": self.state.step, "eval_loss": loss}
        if self.settings.is_language:
            told["eval_perplexity"] = math.exp(min(loss, MAX_EXPONENT))
            told["tokens_seen"] = self.state.num_tokens
        self.report.metrics(told)
        return loss

    def _evaluated(self, evaluate: Evaluate) -> float | None:
        """The held-out loss; where memory runs out beside recorded passes, without these."""
        try:
            return evaluate(self.ask_to_stop)
        except torch.OutOfMemoryError:
            if self.place.world > 1 or self.passes is None or not self.passes.release():
                raise
        return evaluate(self.ask_to_stop)

    def save(self) -> Path:
        """Write a checkpoint of a state that is known to be finite."""
        self.log()
        bad = all_finite(self.state.kept())
        # Where weights are split, only one process may hold the bad one.
        if self._sum([int(bad is not None)]) != [0]:
            where = "a weight of another process" if bad is None else f"the weight {bad}"
            raise self._not_finite(f"after step {self.state.step} {where} is not finite")
        name = f"the checkpoint of step {self.state.step}"
        with self.place.during(name), self.report.phase("checkpoint"), self._counted(SAVE):
            self.place.barrier(name)
            return self.checkpoints.save(self.state)

    def _counted(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext() if self.memory is None else self.memory.during(phase)

    def _not_finite(self, what: str) -> TrainingError:
        last = self.checkpoints.latest()
        kept = (
            "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        )
        return TrainingError(
            f"{what}: {kept}; lower optim.learning_rate, or use train.precision=bf16 or fp32"
        )
