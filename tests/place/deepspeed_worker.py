"""One process of the tests of deepspeed: trains every case and writes what it saw.

Checkpoints are written at the end of runs alone. Run by test_deepspeed.py with a folder that holds
`base/`, `train.jsonl` and `cases.json`.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nibble.data import Splits, prepare
from nibble.optim.shards import FLAT
from nibble.place import Group, Placement, placement
from nibble.run import _load
from nibble.spec.config import Recipe
from nibble.train.checkpoint import Checkpoints
from nibble.train.loop import loop
from nibble.train.report import Report
from nibble.use.assemble import assemble
from nibble.use.objective import objective

MORE: dict[str, dict[str, Any]] = {"stream": {"resident_blocks": 0}}
"""What makes a tiny model do what a large one does."""


class Recorder:
    """Losses by step, and whole gradients of the steps asked for."""

    name, every_step = "recorder", True

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.norms: dict[int, float] = {}

    def begin(self, *, first_step: int, max_steps: int) -> None:
        pass

    def metrics(self, values: dict[str, float]) -> None:
        self.losses[int(values["step"])] = values["loss"]
        self.norms[int(values["step"])] = values["grad_norm"]

    def note(self, text: str) -> None:
        pass

    def phase(self, *words: Any, **more: Any) -> None:
        pass

    def close(self) -> None:
        pass


def whole(tensor: Tensor, place: Placement, name: str) -> Tensor:
    """All of a trained tensor of which a part lives here."""
    view = place.view(name)
    if view.dim is None:
        return tensor.detach().cpu().clone()
    found = torch.zeros(view.shape)
    there = found.view(-1) if view.dim == FLAT else found
    there.narrow(view.dim, view.start, tensor.shape[view.dim]).copy_(tensor.detach())
    return place.sum(found)


def record_gradients(place: Any, kept: list[dict[str, Tensor]]) -> None:
    """Keep the gradients that each step clips."""
    clip = place.clip_

    def recorded(parameters: Any, max_norm: float | None) -> Tensor:
        named = place.trained(place.model_of_test)
        grads = {n: p if p.numel() == 0 else p.grad for n, p in named.items()}
        kept.append({n: whole(g, place, n) for n, g in grads.items() if g is not None})
        return clip(parameters, max_norm)

    place.clip_ = recorded


def train(
    case: dict[str, Any], kind: str, group: Group, folder: Path, splits: Splits, *, steps: int
) -> dict[str, Any]:
    """`steps` steps in all, going on with the checkpoint in `folder` if there is one."""
    words = json.loads(json.dumps(case["recipe"]))
    device = words["place"]["device"]
    words["place"] = {"device": device, "kind": kind, **MORE.get(kind, {}), **case.get("place", {})}
    words["train"]["gradient_accumulation_steps"] = case["accumulation"] * 2 // group.world
    words["train"]["max_steps"] = steps
    if kind == "single":
        words["place"].pop("zero_stage", None)
    recipe = Recipe.model_validate(words)
    torch.manual_seed(0)
    place: Any = placement(recipe.place, group)
    assembly = assemble(recipe)
    recorder, kept = Recorder(), []
    with Report([recorder]) as report:
        state, settings = _load(assembly, splits, place, report)
        place.model_of_test = state.model
        record_gradients(place, kept)
        checkpoints = Checkpoints(folder, keep=9)
        if folder.is_dir():
            checkpoints.resume(state)
        loss = place.around(objective(assembly.built.family, task="causal-lm", chunk=64))
        loop(
            state, place=place, objective=loss, settings=settings, report=report,
            checkpoints=checkpoints,
        )  # fmt: skip
    weights = {n: whole(p, place, n) for n, p in place.trained(state.model).items()}
    place.close()
    return {
        "losses": recorder.losses,
        "norms": recorder.norms,
        "gradients": dict(zip(sorted(recorder.losses), kept, strict=True)),
        "weights": weights,
        "tokens": state.num_tokens,
    }


def run_case(
    case: dict[str, Any], group: Group, root: Path, splits: Splits, found: dict[str, Any]
) -> None:
    """A case on its placements; `single` is done by one of the processes."""
    alone = Group.alone(group.device)
    name, steps = case["name"], case["steps"]
    single, other = root / f"{name}-single", root / f"{name}-{case['kind']}"
    if case["kind"] == "single":
        if case["number"] % 2 == group.rank:
            found[name] = train(case, "single", alone, single, splits, steps=steps)
        return
    found[name] = train(case, case["kind"], group, other, splits, steps=steps)
    if not case["restore"]:
        return
    # Half way with two and on with one, and the other way round.
    half = steps // 2
    train(case, case["kind"], group, other.with_suffix(".half"), splits, steps=half)
    group.barrier("the half with two")
    if group.rank == 0:
        shutil.copytree(other.with_suffix(".half"), single.with_suffix(".on"))
        found[f"{name} 2 to 1"] = train(
            case, "single", alone, single.with_suffix(".on"), splits, steps=steps
        )
        train(case, "single", alone, single.with_suffix(".half"), splits, steps=half)
    group.barrier("the half with one")
    found[f"{name} 1 to 2"] = train(
        case, case["kind"], group, single.with_suffix(".half"), splits, steps=steps
    )


def main(root: Path) -> None:
    cases = json.loads((root / "cases.json").read_text())
    group = Group.from_environment(Recipe.model_validate(cases[0]["recipe"]).place)
    recipe = Recipe.model_validate(cases[0]["recipe"])
    from nibble.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    splits = prepare(recipe.data, tokenizer, task="causal-lm", seed=0, can_pack=True)
    found: dict[str, Any] = {}
    gc.freeze()  # deepspeed collects garbage at each start
    for number, case in enumerate(cases):
        case["number"] = number
        began = time.perf_counter()
        try:
            run_case(case, group, root, splits, found)
        except Exception:
            found[case["name"]] = {"error": traceback.format_exc()}
        print(f"{case['name']}: {time.perf_counter() - began:.2f} s", flush=True)
    torch.save(found, root / f"found-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
