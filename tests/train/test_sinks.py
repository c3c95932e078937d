"""Progress reaches every sink, and no sink can end a run."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from loop_fakes import Recorder

from nibble.errors import ConfigError
from nibble.train.live import BARS, LiveSink, sparkline
from nibble.train.report import Report, duration
from nibble.train.sinks import (
    JsonlSink,
    PlainSink,
    SinkContext,
    TensorboardSink,
    WandbSink,
    make_sinks,
)


def values(step: int, **more: float) -> dict[str, float]:
    return {
        "step": step, "epoch": step / 10, "loss": 2.0 - step / 10, "learning_rate": 1e-3,
        "grad_norm": 0.5, "tokens_per_s": 1234.5, "num_targets": 10, "num_tokens": 20,
        "step_s": 0.5, "peak_gib": 1.25, **more,
    }  # fmt: skip


def context(folder: Path, step: int = 0) -> SinkContext:
    return SinkContext(run=folder, step=step, project="p", run_name="n", recipe={"a": {"b": 1}})


class Broken(Recorder):
    name = "broken"

    def metrics(self, values: Mapping[str, float]) -> None:
        raise ConnectionError("no network\nat all")


def test_a_sink_that_fails_is_left_out_with_one_line() -> None:
    broken, sound = Broken(), Recorder()
    with Report([broken, sound]) as report:
        report.begin(first_step=0, max_steps=3)
        for step in (1, 2, 3):
            report.metrics(values(step))
    assert [v["step"] for v in sound.values] == [1, 2, 3]
    assert sound.notes == ["broken failed and is left out from here on: no network"]
    assert broken.notes == []


def test_the_file_has_every_step_and_people_every_nth(tmp_path: Path) -> None:
    out = io.StringIO()
    sinks = make_sinks(("plain",), context(tmp_path), stream=out)
    with Report(sinks, log_every=3) as report:
        report.begin(first_step=0, max_steps=7)
        for step in range(1, 8):
            report.metrics(values(step))
        report.metrics({"step": 7, "eval_loss": 1.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert json.loads(lines[2]) == values(3)
    said = out.getvalue().splitlines()
    assert [x.split()[1] for x in said] == ["3/7", "6/7", "7/7", "7/7"]
    assert said[0] == (
        "step 3/7  loss 1.7000  lr 1.00e-03  grad 0.500  1,234 tokens/s  peak 1.25 GiB  2.0s left"
    )
    assert said[3] == "step 7/7  held-out loss 1.5000"


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path, step=0)
    for step in (1, 2, 3, 4):
        first.metrics(values(step))
    first.close()
    second = JsonlSink(path, step=2)
    for step in (3, 4, 5):
        second.metrics(values(step))
    second.close()
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    JsonlSink(path, step=0).close()
    assert path.read_text() == ""


def test_progress_on_a_pipe_is_plain_lines(tmp_path: Path) -> None:
    sinks = make_sinks(("progress", "progress"), context(tmp_path), stream=io.StringIO())
    assert [type(s) for s in sinks] == [JsonlSink, PlainSink]
    for sink in sinks:
        sink.close()


def test_long_phases_speak_on_a_pipe_and_short_ones_do_not() -> None:
    out = io.StringIO()
    sink = PlainSink(out)
    sink.phase("load", 0, 10, 0.0, ended=False)
    sink.phase("load", 2, 10, 4.0, ended=False)
    assert out.getvalue() == ""
    sink.phase("load", 5, 10, 6.0, ended=False)
    sink.phase("load", 6, 10, 7.0, ended=False)
    sink.phase("load", 9, 10, 12.0, ended=False)
    sink.phase("load", 10, 10, 13.0, ended=True)
    sink.phase("held-out loss", 0, None, 0.0, ended=False)
    sink.phase("held-out loss", 0, None, 0.2, ended=True)
    assert out.getvalue().splitlines() == [
        "load: 5/10 after 6.0s", "load: 9/10 after 12s", "load: done in 13s",
    ]  # fmt: skip


def test_a_phase_reports_its_extent() -> None:
    recorder = Recorder()
    with (
        pytest.raises(ValueError, match="stop"),
        Report([recorder]).phase("load", total=3) as phase,
    ):
        phase.advance()
        phase.advance(2)
        raise ValueError("stop")
    assert recorder.phases == [
        ("load", 0, 3, False), ("load", 1, 3, False), ("load", 3, 3, False), ("load", 3, 3, True),
    ]  # fmt: skip


def test_the_live_view_shows_the_run() -> None:
    out = io.StringIO()
    sink = LiveSink(out, force_terminal=True)
    sink.phase("load weights", 3, 10, 1.0, ended=False)
    sink._live.refresh()
    assert "load weights" in out.getvalue() and "3/10" in out.getvalue()
    sink.phase("load weights", 10, 10, 2.0, ended=True)
    sink.begin(first_step=0, max_steps=20)
    sink.metrics({"step": 0, "eval_loss": 2.5})
    for step in range(1, 11):
        sink.metrics(values(step))
    sink.metrics({"step": 10, "eval_loss": 1.25})
    sink.note("[a] line")
    sink.close()
    said = out.getvalue()
    for word in (
        "load weights: 2.0s", "10/20", "5.0s left", "1.0000", "1,234 tokens/s", "peak 1.25 GiB",
        "lr 1.00e-03", "grad norm 0.500", "held-out loss 2.5000 at step 0, 1.2500 at step 10",
        "[a] line", "█▇",
    ):  # fmt: skip
        assert word in said, word


def test_the_sparkline_is_the_means_of_equal_shares() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0]) == BARS[0]
    assert sparkline([float(i) for i in range(8)]) == BARS
    falling = sparkline([100.0 - i for i in range(1000)], width=8)
    assert falling == BARS[::-1]


def test_durations_are_short() -> None:
    said = [duration(s) for s in (0.04, 9.96, 42.4, 75, 3725, 90_000)]
    assert said == ["0.0s", "10.0s", "42s", "1m15s", "1h02m", "25h00m"]


def test_tensorboard_reads_back_what_was_reported(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorboardSink(context(tmp_path))
    for step in (1, 2, 3):
        sink.metrics(values(step))
    sink.metrics({"step": 3, "eval_loss": 1.5})
    sink.close()
    resumed = TensorboardSink(context(tmp_path, step=2))
    resumed.metrics(values(3, loss=9.0))
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [
        (1, 1.9), (2, 1.8), (3, 9.0),
    ]  # fmt: skip
    assert "eval/loss" in events.Tags()["scalars"] and "train/step" not in events.Tags()["scalars"]


def test_wandb_offline_keeps_the_run_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    sink = WandbSink(context(tmp_path))
    sink.begin(first_step=0, max_steps=2)
    sink.metrics(values(1))
    assert dict(sink._run.config) == {"a": {"b": 1}}
    assert dict(sink._run.summary)["train/loss"] == pytest.approx(1.9)
    sink.close()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0
    assert (tmp_path / "wandb-id.txt").read_text().strip() in files[0].name


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_that_is_not_installed_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    hidden = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb",)}
    for module in hidden[name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"{name} is not installed: pip install \"nibble\[{name}\]"
    ):
        make_sinks((name,), context(tmp_path))
