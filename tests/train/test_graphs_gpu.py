"""On a GPU: replays give the gradients of eager passes, with the kernels, formats and policies that
runs have; memory stays under its cap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph_models import Case, distance, train

from nibble.place import graphs as place_graphs
from nibble.place.devices import cap_vram
from nibble.train import graphs

pytestmark = [
    pytest.mark.gpu,
    # Kernels that cannot do what is asked for here say so by a warning.
    pytest.mark.filterwarnings("ignore:.*determinis"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GIB = 1 << 30
BASE = Case(device="cuda", dtype=torch.bfloat16, hidden=256, length=512, num_layers=4, steps=6)
CASES = {
    "nf4 lora": BASE,
    "nf4 lora, recomputed": replace(BASE, policy="full"),
    "nf4 lora, two blocks kept": replace(BASE, policy="full", keep_blocks=2),
    "nf4 lora, attention kept": replace(BASE, policy="selective", packed=True),
    "packed": replace(BASE, packed=True),
    "packed answers": replace(BASE, packed=True, answers=True, accumulation=3),
    "answers": replace(BASE, answers=True),
    "rows of many lengths": replace(BASE, ragged=True, steps=8),
    "int8 lora": replace(BASE, quant="int8"),
    "int8 lora, recomputed": replace(BASE, quant="int8", policy="full"),
    "hqq dora": replace(BASE, quant="hqq", adapter="dora"),
    "bf16 lora": replace(BASE, quant="none"),
    "full": replace(BASE, quant="none", adapter="none", accumulation=1),
}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def say(name: str, notes: list[str]) -> str:
    return f"{name}: " + "; ".join(note for note in notes if "graph" in note)


@pytest.mark.parametrize("name", CASES)
def test_replays_are_eager_passes(
    name: str, tmp_path: Path, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    off = train(case, tmp_path / "off", graphs="off")
    on = train(case, tmp_path / "on", graphs="on")
    assert any("run as a CUDA graph" in note for note in on.notes), say(name, on.notes)
    # Other shapes and another attention: bf16 noise, also of what AdamW makes of it.
    assert distance(off, on) < (0.1 if case.packed or case.answers or case.ragged else 0.05)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 0)
    eager = train(case, tmp_path / "eager", graphs="on")
    assert not any("run as a CUDA graph" in note for note in eager.notes)
    assert distance(eager, on) < 1e-3, "the same work, recorded and not"


def test_dropout_draws_what_it_would_have_drawn(
    tmp_path: Path, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(BASE, dropout=0.2)
    on = train(case, tmp_path / "on", graphs="on")
    assert any("run as a CUDA graph" in note for note in on.notes), say("dropout", on.notes)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 0)
    assert distance(train(case, tmp_path / "eager", graphs="on"), on) < 1e-3


def test_a_run_that_goes_on_is_the_run_that_never_stopped(
    tmp_path: Path, deterministic: None
) -> None:
    straight = train(BASE, tmp_path / "a", graphs="on")
    train(BASE, tmp_path / "b", graphs="on", max_steps=3)
    resumed = train(BASE, tmp_path / "b", graphs="on", resume=True)
    for key, value in straight.weights.items():
        assert (value - resumed.weights[key]).norm() <= 1e-5 * value.norm(), key


def test_blocks_that_draw_and_compute_again_stay_eager(tmp_path: Path) -> None:
    case = replace(BASE, dropout=0.2, policy="full", steps=3)
    notes = train(case, tmp_path, graphs="on").notes
    assert any("no CUDA graphs: blocks that draw" in note for note in notes)


def test_memory_stays_under_its_cap(tmp_path: Path) -> None:
    case = replace(BASE, hidden=512, num_layers=8, rows=4, length=2048, accumulation=1)
    off = train(case, tmp_path / "off", graphs="off").peak_bytes
    cap = off + 2 * place_graphs.SPARE_BYTES
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    cap_vram(device, cap)
    try:
        on = train(case, tmp_path / "on", graphs="on")
    finally:
        total = torch.cuda.get_device_properties(device).total_memory
        cap_vram(device, total)
    assert any("run as a CUDA graph" in note for note in on.notes), say("capped", on.notes)
    assert on.peak_bytes <= cap


def test_without_memory_for_it_there_is_no_graph(
    tmp_path: Path, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(BASE, tmp_path / "off", graphs="on")
    monkeypatch.setattr(place_graphs, "SPARE_BYTES", 1 << 46)
    found = train(BASE, tmp_path / "on", graphs="on")
    assert any("no CUDA graph for micro-batches" in note for note in found.notes)
    assert distance(expected, found) < 1e-3
    assert torch.cuda.memory_reserved() < 8 * GIB, "what the recording had is given back"


def test_a_failure_while_recording_leaves_the_run_as_it_was(
    tmp_path: Path, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(BASE, tmp_path / "off", graphs="on")
    observe = place_graphs.CudaRecorder.observe
    reads = []

    def blind(self: place_graphs.CudaRecorder, work: object) -> object:
        result, observed = observe(self, work)  # type: ignore[arg-type]
        return result, replace(observed, waits=None)

    def wait(*unused: object) -> None:
        reads.append(float(torch.ones((), device="cuda").sum()))

    monkeypatch.setattr(place_graphs.CudaRecorder, "observe", blind)
    from nibble.nn import fused

    monkeypatch.setattr(
        fused._Refresh, "__call__", lambda self, *_: (wait(), self.casts.refresh(self.dtype))[1]
    )
    found = train(BASE, tmp_path / "on", graphs="on")
    assert any("no CUDA graph for micro-batches" in note for note in found.notes)
    assert distance(expected, found) < 1e-3
    assert torch.randn(8, device="cuda").unique().numel() == 8, "who draws is in no recording"


def test_a_wait_is_seen_before_anything_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibble.nn import fused

    monkeypatch.setattr(
        fused._Refresh,
        "__call__",
        lambda self, *_: (
            torch.ones(3, device="cuda").sum().item(),
            self.casts.refresh(self.dtype),
        )[1],
    )
    notes = train(replace(BASE, steps=4), tmp_path, graphs="on").notes
    assert any("the host waits for the device in it" in note for note in notes), notes


@pytest.mark.parametrize("policy", ["none", "full"])
def test_packed_rows_of_many_shapes_take_the_memory_of_one_pass(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pool of a pass's size would be 40 % more here."""
    case = replace(BASE, hidden=512, num_layers=8, rows=4, length=2048, packed=True, answers=True)
    case = replace(case, policy=policy, accumulation=2, steps=12)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "MAX_GRAPHS", 0)
        off = train(case, tmp_path / "off", graphs="on").peak_bytes
    torch.cuda.empty_cache()
    on = train(case, tmp_path / "on", graphs="on")
    said = say("packed", on.notes)
    assert sum("run as a CUDA graph" in note for note in on.notes) >= 2, said
    assert not any("no CUDA graph" in note for note in on.notes), said
    assert on.peak_bytes <= 1.15 * off + place_graphs.SPARE_BYTES, said


def test_graphs_that_are_given_up_give_their_memory_back(
    tmp_path: Path, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(BASE, hidden=512, num_layers=8, rows=4, length=2048, ragged=True, steps=8)
    expected = train(case, tmp_path / "off", graphs="on")
    # Attention's backward adds up in no fixed order at this length, and AdamW makes much of it.
    noise = distance(expected, train(case, tmp_path / "again", graphs="on"))
    cached: list[int] = []
    pools: list[int] = []
    release = place_graphs.CudaRecorder.release

    def watched(self: place_graphs.CudaRecorder) -> None:
        self._empty()
        pools.append(self._pool_bytes)
        release(self)
        cached.append(torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(place_graphs.CudaRecorder, "release", watched)
    monkeypatch.setattr(
        place_graphs.CudaRecorder, "has_room", lambda self, n: n == place_graphs.SPARE_BYTES
    )
    found = train(case, tmp_path / "on", graphs="on")
    assert len(cached) == 1 and pools[0] > 0, say("given up", found.notes)
    assert cached[0] < pools[0] // 2, "the pool is gone"
    assert distance(expected, found) < 2 * noise + 1e-3
