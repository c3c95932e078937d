"""The loop alone: token weighting, precision, evaluation, interrupts, and stopping before harm."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loop_fakes import FakeLoader, make_batch, make_state, next_token, pieces, run
from torch import Tensor, nn

from nibble.data import Batch
from nibble.errors import TrainingError
from nibble.spec.config import Optim
from nibble.train.checkpoint import all_checkpoints, latest
from nibble.train.metrics import Meter
from nibble.train.state import LossScaler, TrainState


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.trained().items()}


def gradients_seen(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What the optimiser finds in each step."""
    seen: list[dict[str, Tensor]] = []
    step = state.optimizer.step

    def spy() -> None:
        seen.append({n: p.grad.clone() for n, p in state.trained().items() if p.grad is not None})
        step()

    monkeypatch.setattr(state.optimizer, "step", spy)
    return seen


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (1, 5), (4, 2)])
def test_k_micro_batches_equal_one_batch(
    sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = make_state(sizes=(6,)), make_state(sizes=sizes)
    grads = [gradients_seen(s, monkeypatch) for s in (whole, parts)]
    (_, one), (_, many) = (
        run(s, tmp_path / str(i), max_steps=5) for i, s in enumerate((whole, parts))
    )
    for a, b in zip(*grads, strict=True):
        for name in a:
            assert (a[name] - b[name]).abs().max() <= 1e-5
    for name, value in weights(whole).items():
        assert (value - weights(parts)[name]).abs().max() <= 1e-5
    assert one.losses == pytest.approx(many.losses, abs=1e-5)


def test_a_step_weighs_targets_and_not_micro_batches(tmp_path: Path) -> None:
    state = make_state(sizes=(1, 5))
    batch = make_batch(6, seed=1)
    expected = next_token(state.model, batch).item() / batch.num_targets
    mean_of_means = (
        sum(next_token(state.model, p).item() / p.num_targets for p in pieces(batch, (1, 5))) / 2
    )
    _, seen = run(state, tmp_path, max_steps=1)
    assert seen.losses[1] == pytest.approx(expected, abs=1e-6)
    assert abs(seen.losses[1] - mean_of_means) > 1e-3


def test_the_loop_learns_and_reports_what_it_did(tmp_path: Path) -> None:
    state = make_state(optim=Optim(learning_rate=3e-2, schedule="linear", warmup_steps=2))
    _, seen = run(state, tmp_path, max_steps=6)
    assert seen.losses[6] < seen.losses[1] - 0.1
    row = next(v for v in seen.values if v["step"] == 3)
    assert row["num_targets"] == make_batch(3, seed=3).num_targets
    assert row["num_tokens"] == 3 * 12 - 2
    assert row["epoch"] == pytest.approx(1.0)
    assert row["learning_rate"] == pytest.approx(3e-2)
    assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["step_s"])
    assert row["peak_gib"] > 0.05
    assert [v["learning_rate"] for v in seen.values][:2] == pytest.approx([0.0, 1.5e-2])


def test_gradients_are_clipped_to_the_norm_and_the_norm_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norm_of(grads: dict[str, Tensor]) -> float:
        return float(torch.stack([g.norm() for g in grads.values()]).norm())

    free, held = make_state(), make_state()
    free_seen, held_seen = (gradients_seen(s, monkeypatch) for s in (free, held))
    _, a = run(free, tmp_path / "a", max_steps=1, max_grad_norm=None)
    _, b = run(held, tmp_path / "b", max_steps=1, max_grad_norm=0.01)
    assert a.values[0]["grad_norm"] == pytest.approx(b.values[0]["grad_norm"])
    assert norm_of(free_seen[0]) == pytest.approx(a.values[0]["grad_norm"], rel=1e-5)
    assert norm_of(held_seen[0]) == pytest.approx(0.01, rel=1e-3)


def test_held_out_loss_comes_before_after_and_between(tmp_path: Path) -> None:
    asked: list[int] = []
    state = make_state()

    def evaluate(stop: Callable[[], bool]) -> float:
        asked.append(state.step)
        return 5.0 - state.step

    outcome, seen = run(state, tmp_path, max_steps=5, eval_every=2, evaluate=evaluate)
    assert asked == [0, 2, 4, 5]
    assert seen.eval_losses == [(0, 5.0), (2, 3.0), (4, 1.0), (5, 0.0)]
    assert (outcome.eval_loss_before, outcome.eval_loss_after) == (5.0, 0.0)


def test_checkpoints_come_by_steps_and_at_the_end(tmp_path: Path) -> None:
    outcome, _ = run(make_state(), tmp_path, max_steps=5, save_every=2, keep=2)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert outcome.checkpoint == tmp_path / "checkpoint-5" and not outcome.interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_and_saves(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def interrupted(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first of two micro-batches of step 2
            signal.raise_signal(number)
        return next_token(model, batch)

    before = signal.getsignal(number)
    outcome, seen = run(make_state(), tmp_path, objective=interrupted)
    assert (outcome.step, outcome.interrupted, calls) == (2, True, 4)
    assert outcome.checkpoint == tmp_path / "checkpoint-2" and latest(tmp_path) is not None
    assert sorted(seen.losses) == [1, 2]
    assert number.name in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    def insistent(model: nn.Module, batch: Batch) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        run(make_state(), tmp_path, objective=insistent)
    assert latest(tmp_path) is None


def test_a_signal_during_evaluation_leaves_it_and_saves(tmp_path: Path) -> None:
    state = make_state()

    def evaluate(stop: Callable[[], bool]) -> float | None:
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)
        return None if stop() else 1.0

    outcome, seen = run(state, tmp_path, eval_every=2, evaluate=evaluate)
    assert outcome.interrupted and outcome.step == 2 and seen.eval_losses == [(0, 1.0)]
    assert outcome.checkpoint == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    bad: float, log_every: int, tmp_path: Path
) -> None:
    state = make_state()

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        loss = next_token(model, batch)
        return loss * bad if state.step == 3 else loss

    with pytest.raises(TrainingError) as told:
        run(state, tmp_path, objective=broken, save_every=2, log_every=log_every)
    assert "step 4" in str(told.value) and str(tmp_path / "checkpoint-2") in str(told.value)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    state = make_state()

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        zero = model.inner.weight.sum() * 0
        return next_token(model, batch) + zero.sqrt()  # value 0, gradient 0 * inf

    with pytest.raises(TrainingError, match=r"gradient norm of step 1 .*no checkpoint yet"):
        run(state, tmp_path, objective=broken)


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    step = state.optimizer.step

    def overflowing() -> None:
        step()
        if state.step == 2:
            state.model.get_parameter("inner.weight").data[0, 0] = float("inf")

    monkeypatch.setattr(state.optimizer, "step", overflowing)
    with pytest.raises(TrainingError, match=r"after step 3 the weight inner.weight"):
        run(state, tmp_path, save_every=1)
    assert latest(tmp_path) == tmp_path / "checkpoint-2"


def test_loss_scaling_changes_nothing_but_the_range(tmp_path: Path) -> None:
    plain, scaled = make_state(), make_state(fp16=True)
    _, a = run(plain, tmp_path / "a")
    _, b = run(scaled, tmp_path / "b")
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(scaled)[name], atol=1e-6, rtol=1e-5)
    assert [v["grad_norm"] for v in a.values] == pytest.approx([v["grad_norm"] for v in b.values])
    assert b.values[0]["loss_scale"] == 65536.0 and scaled.scaler.num_good_steps == 6


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path: Path) -> None:
    state = make_state(fp16=True, optim=Optim(learning_rate=1e-2, schedule="constant"))
    before = weights(state)
    held: dict[str, Tensor] = {}

    def overflows_once(model: nn.Module, batch: Batch) -> Tensor:
        if state.step == 1 and not held:
            held.update(weights(state))
        loss = next_token(model, batch)
        if state.step == 0:
            loss.register_hook(lambda g: g * float("inf"))
        return loss

    _, seen = run(state, tmp_path / "grad", objective=overflows_once, max_steps=2)
    assert all(torch.equal(held[name], before[name]) for name in before)
    assert seen.values[0]["skipped"] == 1 and "grad_norm" not in seen.values[0]
    assert seen.values[1]["skipped"] == 0 and seen.values[1]["loss_scale"] == 32768.0
    assert state.schedule.num_updates == 1  # no update, no progress of the schedule
    assert any(not torch.equal(v, before[n]) for n, v in weights(state).items())


def test_a_loss_that_is_not_finite_is_no_overflow(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss of step 1 is"):
        run(make_state(fp16=True), tmp_path, objective=lambda m, b: next_token(m, b) * 1e39)


def test_a_scale_that_finds_no_bottom_is_an_error(tmp_path: Path) -> None:
    state = make_state(fp16=True)

    def hopeless(model: nn.Module, batch: Batch) -> Tensor:
        loss = next_token(model, batch)
        loss.register_hook(lambda g: g * float("nan"))
        return loss

    with pytest.raises(TrainingError, match="overflow fp16 at any loss scale"):
        run(state, tmp_path, objective=hopeless, max_steps=100)
    assert state.step == 17  # 2^16 halved 17 times


def test_the_scale_grows_after_good_steps() -> None:
    scaler = LossScaler(enabled=True, scale=8.0, growth_interval=3)
    for finite in (True, True, False, True, True, True):
        scaler.update(finite=finite)
    assert (scaler.scale, scaler.num_good_steps) == (8.0, 0)


def test_autocast_computes_in_half_and_keeps_weights_wide(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def spying(model: nn.Module, batch: Batch) -> Tensor:
        hidden = model(batch.input_ids)
        seen.append(model.inner(model.embed(batch.input_ids)).dtype)
        assert hidden.isfinite().all()
        return next_token(model, batch)

    state, plain = make_state(fp16=True), make_state()
    _, a = run(state, tmp_path / "a", objective=spying, autocast=torch.float16)
    _, b = run(plain, tmp_path / "b")
    assert set(seen) == {torch.float16}
    assert {p.dtype for p in state.trained().values()} == {torch.float32}
    assert a.losses == pytest.approx(b.losses, rel=5e-3)


def test_the_device_is_read_once_a_logged_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = Meter.read

    def counted(meter: Meter) -> list[dict[str, float]]:
        found = read(meter)
        if found:
            reads.append(len(found))
        return found

    monkeypatch.setattr(Meter, "read", counted)
    hosts: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(Tensor, name)

        def spy(self: Tensor, *args: object, original=original, name=name) -> object:  # type: ignore[no-untyped-def]
            hosts.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, spy)
    state = make_state(optim=Optim(learning_rate=1e-3))
    state.loader = FakeLoader((1,))
    batches = [pieces(make_batch(1, seed=s), (1,)) for s in range(6)]
    monkeypatch.setattr(FakeLoader, "__iter__", lambda self: iter(batches))
    hosts.clear()
    _, seen = run(state, tmp_path, log_every=3)
    assert reads == [3, 3] and sorted(seen.losses) == [1, 2, 3, 4, 5, 6]
    # One list a logged step, and one before saving. (Masks are counted on the host, by int().)
    assert hosts.count("tolist") <= 3 and not {"item", "__float__"} & set(hosts)
