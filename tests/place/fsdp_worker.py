"""One process of the tests of sharding: trains the cases it is told to and writes what it saw.

Run by test_fsdp.py with a folder that holds models, `train.jsonl` and a list of cases.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from placements_worker import Recorder
from torch import Tensor
from torch.distributed.tensor import DTensor

from nibble.data import Splits, one_pass, prepare
from nibble.errors import CheckpointError
from nibble.launch.leaving import leave
from nibble.models import load_tokenizer
from nibble.nn.quant import QuantLinear
from nibble.place import Group, placement, shard_views
from nibble.run import _load, _write_model
from nibble.spec.config import Recipe
from nibble.train.checkpoint import Checkpoints
from nibble.train.loop import loop
from nibble.train.report import Report
from nibble.train.state import seed_everything
from nibble.use import packed
from nibble.use.assemble import assemble
from nibble.use.objective import held_out_loss, objective
from nibble.weights import safetensors_source
from nibble.weights.packed_cache import cache_folder

COPIES = "copies"


def whole(tensor: Tensor, place: Any, name: str) -> Tensor:
    """All of a trained tensor of which a part lives here."""
    view = place.view(name)
    if view.dim is None:
        return tensor.detach().cpu().clone()
    found = torch.zeros(view.shape)
    if place.rank < place.num_parts:
        found.narrow(view.dim, view.start, tensor.shape[view.dim]).copy_(tensor.detach())
    return place.sum(found)


def record_gradients(place: Any, named: dict[str, Any], kept: list[dict[str, Tensor]]) -> None:
    clip = place.clip_

    def recorded(parameters: Any, max_norm: float | None) -> Tensor:
        kept.append({n: whole(p.grad, place, n) for n, p in named.items() if p.grad is not None})
        return clip(parameters, max_norm)

    place.clip_ = recorded


def packed_bytes(model: Any, place: Any) -> dict[str, Tensor]:
    """Every packed tensor, whole, by the bytes that the processes hold."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        for key, held in module.stored().items():
            local = getattr(held, "_local_tensor", held).detach().contiguous()
            mine = local.view(torch.uint8)
            if local is held.detach() or place.num_parts == 1 or local.shape == held.shape:
                found[f"{name}.{key}"] = mine.cpu().clone()
                continue
            sizes = [part.shape[0] for part in place.group.gather(mine.cpu())[: place.num_parts]]
            collected = place.whole(mine, 0, sizes)
            if collected is not None:
                found[f"{name}.{key}"] = collected
    return found


def held_bytes(model: Any) -> dict[str, int]:
    """Bytes of each parameter that live here."""
    return {
        name: getattr(p, "_local_tensor", p).detach().nbytes for name, p in model.named_parameters()
    }


def watch_tables(model: Any) -> set[tuple[str, bool, bool]]:
    """Whether embedding and head lie here in rows when the first block goes each way."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    seen: set[tuple[str, bool, bool]] = set()

    def note(when: str) -> None:
        embedding, head = (isinstance(table.weight, DTensor) for table in tables)
        seen.add((when, embedding, head))

    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda *_: note("forward"))
    block.register_full_backward_pre_hook(lambda *_: note("backward"))
    return seen


class ReadBytes:
    """Counts what is read of checkpoints."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.read = safetensors_source.read_tensor

    def __enter__(self) -> ReadBytes:
        def counted(extent: Any) -> Tensor:
            self.num_bytes += extent.num_bytes
            return self.read(extent)

        safetensors_source.read_tensor = counted
        return self

    def __exit__(self, *_: object) -> None:
        safetensors_source.read_tensor = self.read


def train(
    case: dict[str, Any], group: Group, folder: Path, splits: Splits, *, steps: int | None = None
) -> dict[str, Any]:
    """What a run of `steps` steps in all sees, going on with the checkpoint in `folder`."""
    words = json.loads(json.dumps(case["recipe"]))
    device = group.device.type
    words["place"] = {"device": device, "kind": "fsdp", "timeout_s": 60, **case.get("place", {})}
    if group.world == 1:
        words["place"] = {"device": device, "kind": "single"}
    words["train"]["gradient_accumulation_steps"] = case["passes"] // group.world
    words["train"]["max_steps"] = steps or case["steps"]
    recipe = Recipe.model_validate(words)
    shard_views.SHARDS_INTEGERS = not case.get("as_floats", False)
    seed_everything(group.rank)
    place: Any = placement(recipe.place, group, optim=recipe.optim)
    assembly = assemble(recipe)
    recorder, kept = Recorder(), []
    with Report([recorder]) as report:
        with ReadBytes() as reading:
            state, settings = _load(assembly, splits, place, report)
        named = state.trained()
        record_gradients(place, named, kept)
        before = packed_bytes(state.model, place)
        held = held_bytes(state.model)
        checkpoints = Checkpoints(folder, keep=9, write_model=_write_model(assembly, state.model))
        checkpoints.resume(state)
        if case.get("rewrite"):
            Checkpoints(folder.with_name(case["rewrite"]), keep=9).save(state)
        seen = watch_tables(state.model) if group.world > 1 else set()
        loss = place.around(objective(assembly.built.family, task="causal-lm", chunk=64))
        loop(
            state, place=place, objective=loss, settings=settings, report=report,
            checkpoints=checkpoints,
        )  # fmt: skip
        rows = one_pass(splits.train, micro_batch_size=2, rank=place.rank, world=place.world)
        held_out = held_out_loss(state.model, rows, place=place, objective=loss)
        if case.get("full_disk"):
            case["told"] = refusal_of_a_full_disk(state, checkpoints, group)
    place._decoder.reshard() if group.world > 1 else None
    found = {
        "losses": recorder.losses,
        "norms": recorder.norms,
        "first": kept[0],
        "last": kept[-1],
        "weights": {n: whole(p, place, n) for n, p in named.items()},
        "held_out": held_out,
        "before": before,
        "tables": seen,
        "after": packed_bytes(state.model, place),
        "held_bytes": held,
        "read_bytes": reading.num_bytes,
        "dims": {n: place.view(n).dim for n in named},
        "told": case.get("told"),
    }
    place.close()
    return found


def refusal_of_a_full_disk(state: Any, checkpoints: Checkpoints, group: Group) -> str:
    """What saving says here when the first process cannot write."""
    state.step += 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        checkpoints.save(state)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        state.step -= 1
    return "saved"


def run_case(
    case: dict[str, Any], group: Group, root: Path, splits: Splits, found: dict[str, Any]
) -> None:
    """A case with all processes; alone too, where it is to be compared (by one of them)."""
    alone = Group.alone(group.device)
    name = case["name"]
    own = root / f"{name}-{group.world}"
    start = case.get("start")
    if start is not None:
        if group.rank == 0:
            shutil.copytree(root / start, own)
        group.barrier("the copy")
    found[name] = train(case, group, own, splits)
    if case.get("alone", True) and case["number"] % group.world == group.rank:
        case_alone = {**case, "as_floats": False, "full_disk": False}
        found[f"{name} alone"] = train(
            case_alone, alone, root / f"{name}-1-of-{group.world}", splits
        )
    if case.get("restore"):
        half = root / f"{name}-half"
        train(case, group, half, splits, steps=case["steps"] // 2)
        group.barrier("the half")
        if group.rank == 0:
            shutil.copytree(half, root / f"{name}-kept")
            shutil.copytree(half, root / f"{name}-one")
            found[f"{name} on 1"] = train(case, alone, root / f"{name}-one", splits)
        group.barrier("on one")
        found[f"{name} on again"] = train(case, group, half, splits)


def await_entry(group: Group) -> None:
    """The packed base is written beside the training: wait until it is whole."""
    until = time.monotonic() + 30
    while group.is_first and not [*cache_folder().glob("*.json")] and time.monotonic() < until:
        time.sleep(0.05)
    group.barrier("the packed base")


def main(root: Path, cases_file: str) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cases = json.loads((root / cases_file).read_text())
    group = Group.from_environment(Recipe.model_validate(cases[0]["recipe"]).place)
    found: dict[str, Any] = {}
    for number, case in enumerate(cases):
        case["number"] = number
        recipe = Recipe.model_validate(case["recipe"])
        tokenizer = load_tokenizer(recipe.model)
        splits = prepare(recipe.data, tokenizer, task="causal-lm", seed=0, can_pack=True)
        # Tiny models are not worth keeping, but where that is what is tested.
        packed.MIN_BYTES = 0 if recipe.quant.cache else 1 << 60
        try:
            run_case(case, group, root, splits, found)
            if recipe.quant.cache:
                await_entry(group)
        except Exception:
            found[case["name"]] = {"error": traceback.format_exc()}
    torch.save(found, root / f"found-{cases_file}-{group.rank}.pt")
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave(0)  # gloo's threads may not see Python end
