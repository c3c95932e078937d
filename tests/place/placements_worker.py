"""One process of the table of placements: trains every case and writes what it saw.

Run by test_all_placements.py with a folder that holds `base/`, `train.jsonl` and `cases.json`.
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
from nibble.launch.leaving import leave
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


def follow_(place: Any, model: Any, weights: list[dict[str, Tensor]]) -> None:
    """Begin each step with the weights that another run had then, whatever was learnt here."""
    following = place.follow
    steps = iter(weights)

    def followed() -> None:
        following()
        theirs = next(steps, None)
        for name, parameter in model.named_parameters() if theirs is not None else ():
            if name in theirs:
                place.put_(parameter, theirs[name])

    place.follow = followed


def train(
    case: dict[str, Any],
    kind: str,
    group: Group,
    folder: Path,
    splits: Splits,
    *,
    weights: list[dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """A run, going on with the checkpoint in `folder` if there is one.

    `weights`: of each step of another run, which this one is given after each of its own.
    """
    words = json.loads(json.dumps(case["recipe"]))
    device = words["place"]["device"]
    words["place"] = {"device": device, "kind": kind, **MORE.get(kind, {}), **case.get("place", {})}
    words["train"]["gradient_accumulation_steps"] = case["accumulation"] * 2 // group.world
    words["train"]["max_steps"] = case["steps"]
    words["train"]["save_every"] = case["steps"] // 2
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
        found: list[dict[str, Tensor]] = []
        if case.get("leads"):
            after = place.follow

            def noted() -> None:
                after()
                found.append({n: whole(p, place, n) for n, p in place.trained(state.model).items()})

            place.follow = noted
        if weights is not None:
            follow_(place, state.model, weights)
        loss = place.around(objective(assembly.built.family, task="causal-lm", chunk=64))
        loop(
            state, place=place, objective=loss, settings=settings, report=report,
            checkpoints=checkpoints,
        )  # fmt: skip
    last = {n: whole(p, place, n) for n, p in place.trained(state.model).items()}
    place.close()
    return {
        "losses": recorder.losses,
        "norms": recorder.norms,
        "gradients": dict(zip(sorted(recorder.losses), kept, strict=True)),
        "weights": last,
        "weights_by_step": found,
        "tokens": state.num_tokens,
    }


def half_of(run: Path, steps: int, target: Path) -> Path:
    """A run folder that holds the checkpoint of another run's middle, and nothing else."""
    name = f"checkpoint-{steps // 2}"
    shutil.copytree(run / name, target / name)
    return target


class Worker:
    """What one process trains: some runs alone, others with the other process."""

    def __init__(self, root: Path, group: Group, splits: Splits) -> None:
        self.root, self.group, self.splits = root, group, splits
        self.alone = Group.alone(group.device)
        self.found: dict[str, Any] = {}
        self.num_alone = 0

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def attempt(self, name: str, *words: Any, **more: Any) -> None:
        began = time.perf_counter()
        try:
            self.found[name] = train(*words, splits=self.splits, **more)
        except Exception:
            self.found[name] = {"error": traceback.format_exc()}
            print(self.found[name]["error"])
        print(f"{name}: {time.perf_counter() - began:.2f} s", flush=True)

    def by_itself(self, case: dict[str, Any], name: str, *, folder: Path) -> None:
        """A run of one process, every second one here."""
        self.num_alone += 1
        if self.num_alone % 2 == self.group.rank:
            self.attempt(name, case, "single", self.alone, folder)

    def together(self, case: dict[str, Any]) -> None:
        """A run of two processes; and again from where one process was half way."""
        name, kind, steps = case["name"], case["kind"], case["steps"]
        single = self.folder(case["single"])
        if case.get("follows"):
            theirs = torch.load(single / "weights.pt")
            self.attempt(name, case, kind, self.group, self.folder(name), weights=theirs)
            return
        self.attempt(name, case, kind, self.group, self.folder(name))
        if case["restore"]:
            on = self.folder(f"{name} 1 to 2")
            if self.group.rank == 0:
                half_of(single, steps, on)
            self.group.barrier("the half of one process")
            self.attempt(f"{name} 1 to 2", case, kind, self.group, on)

    def run(self, cases: list[dict[str, Any]]) -> None:
        """All alone ones side by side, then all of two, then what one goes on with."""
        for case in cases:
            if case["kind"] == "single":
                self.by_itself(case, case["name"], folder=self.folder(case["name"]))
                ran = self.found.get(case["name"], {})
                if case.get("leads") and "error" not in ran and ran:
                    weights = ran.pop("weights_by_step")
                    torch.save(weights, self.folder(case["name"]) / "weights.pt")
        self.group.barrier("the runs of one process")
        several = [case for case in cases if case["kind"] != "single"]
        for case in several:
            self.together(case)
        self.group.barrier("the runs of two processes")
        for case in several:
            if case["restore"]:
                on = self.folder(f"{case['name']} 2 to 1")
                if self.num_alone % 2 != self.group.rank:
                    half_of(self.folder(case["name"]), case["steps"], on)
                self.by_itself(case, f"{case['name']} 2 to 1", folder=on)


def main(root: Path) -> None:
    cases = json.loads((root / "cases.json").read_text())
    recipe = Recipe.model_validate(cases[0]["recipe"])
    group = Group.from_environment(recipe.place)
    from nibble.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    splits = prepare(recipe.data, tokenizer, task="causal-lm", seed=0, can_pack=True)
    gc.freeze()  # deepspeed collects garbage at each start
    worker = Worker(root, group, splits)
    worker.run(cases)
    torch.save(worker.found, root / f"found-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # gloo's threads may not see Python end
