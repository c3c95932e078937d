"""ZeRO by the library itself: the same steps as one device, with less on each process.

Two processes train every row of the table with the real library, where it is installed; one of them
trains the row alone, too.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from safetensors.torch import save_file
from test_all_placements import PATIENCE_S, a_recipe, make_base, make_data, of_single, ran, same

from nibble.errors import ConfigError
from nibble.optim.shards import FLAT
from nibble.place import Group, placement, resolved
from nibble.spec.config import Place, Recipe
from nibble.spec.rules import check
from nibble.train.whole import WholeFile

STAGES = (2, 3)
STEPS = 20
pytestmark = pytest.mark.timeout(PATIENCE_S)
TWO = Group(device=torch.device("cpu"), rank=1, world=2, local_rank=1, local_world=2)
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason='needs pip install "nibble[deepspeed]"'
)


def table(root: Path) -> list[dict[str, Any]]:
    """The rows: stage x what is trained x accumulation; all are gone on with by another
    number of processes, from a checkpoint in mid-run."""
    rows = []
    for adapter in ("none", "lora", "dora"):
        for accumulation in (1, 3):
            for stage in (None, *STAGES):
                kind = "single" if stage is None else "deepspeed"
                rows.append(
                    {
                        "name": f"{stage or 'single'} {adapter} {accumulation}",
                        "single": f"single {adapter} {accumulation}",
                        "kind": kind,
                        "accumulation": accumulation,
                        "steps": STEPS,
                        "restore": True,
                        "recipe": a_recipe(root, "none", adapter),
                        "place": {} if stage is None else {"zero_stage": stage},
                    }
                )
    return rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by row."""
    root = tmp_path_factory.mktemp("deepspeed")
    make_base(root / "base")
    make_data(root / "train.jsonl")
    (root / "cases.json").write_text(json.dumps(table(root)))
    ended = start(Path(__file__).with_name("placements_worker.py"), root, timeout_s=PATIENCE_S - 60)
    for code, output in ended:
        assert code == 0, output[-4000:]
        assert "is deprecated" not in output
    return [torch.load(root / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


NAMES = [row["name"] for row in table(Path(".")) if row["kind"] == "deepspeed"]
RESTORED = [r["name"] for r in table(Path(".")) if r["kind"] == "deepspeed" and r["restore"]]


@needs_library
@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_zero_trains_as_one_device_does(name: str, found: list[dict[str, Any]]) -> None:
    single = of_single(found, name)
    assert sorted(single["losses"]) == list(range(1, STEPS + 1))
    for ranks in found:
        same(ranks[name], single)
        assert sorted(ranks[name]["losses"]) == list(range(1, STEPS + 1))
    assert single["losses"][max(single["losses"])] < single["losses"][1]


@needs_library
@pytest.mark.dist
@pytest.mark.parametrize("name", RESTORED)
def test_a_run_goes_on_with_another_number_of_processes(
    name: str, found: list[dict[str, Any]]
) -> None:
    single = of_single(found, name)
    fewer, more = ran(found, f"{name} 2 to 1"), ran(found, f"{name} 1 to 2")
    for one in (fewer, more):
        assert sorted(one.get("losses", ())) == list(range(STEPS // 2 + 1, STEPS + 1)), one
        same(one, single)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "int8", "hqq"])
def test_quantised_bases_are_refused_by_name(quant: str, adapter: str, tmp_path: Path) -> None:
    words = a_recipe(tmp_path, quant, adapter)
    words["place"] = {"device": "cpu", "kind": "deepspeed"}
    refusal = f"place.kind=deepspeed with quant.format={quant}: ZeRO shards 16-bit weights"
    with pytest.raises(ConfigError, match=refusal):
        check(Recipe.model_validate(words))


def test_a_process_may_say_more_than_a_pipe_holds(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "said, until = Path(sys.argv[1]), time.monotonic() + 10\n"
        "if os.environ['RANK'] == '1':\n"
        "    print('.' * (1 << 20), flush=True)\n"
        "    said.touch()\n"
        "while not said.exists() and time.monotonic() < until:\n"
        "    time.sleep(0.01)\n"
        "sys.exit(not said.exists())\n"
    )
    (first, _), (second, output) = start(script, tmp_path / "said", timeout_s=30)
    assert (first, second) == (0, 0) and len(output) > 1 << 20


def test_without_the_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r'pip install "nibble\[deepspeed\]", or use place.kind'):
        placement(Place(kind="deepspeed"), TWO)


def test_alone_there_is_nothing_to_share_out() -> None:
    words = {"model": {"path": "x"}, "place": {"kind": "deepspeed"}}
    recipe = Recipe.model_validate(words)
    assert resolved(recipe, Group.alone(torch.device("cpu"))).place.kind == "single"
    assert resolved(recipe, TWO).place.kind == "deepspeed"


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (7,), ()])
def test_any_range_of_numbers_is_read_from_a_whole_tensor(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    whole = torch.randn(shape)
    save_file({"w": whole}, tmp_path / "w.safetensors")
    file = WholeFile(tmp_path / "w.safetensors")
    line = whole.reshape(-1)
    for first in range(line.numel() + 1):
        for last in range(first, line.numel() + 1):
            found = file.read("w", FLAT, slice(first, last))
            assert torch.equal(found, line[first:last]), (first, last)
