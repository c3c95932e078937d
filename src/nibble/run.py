"""The main path: from a recipe to a trained model. Reads top to bottom.

Everything that can be refused is refused before weights are read: the run folder, the recipe's fit
with the model, the data, the plan. Weights are then streamed to where they live, quantised on
arrival; the loop does the rest and leaves a checkpoint behind, however it ends.

    RUN/data.json    what became of the rows, label names, tokens that end answers
    RUN/plan.json    what was planned, and at the end what was measured
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from torch import nn

from nibble import optim
from nibble.data import Splits, make_loader, num_steps, one_pass, prepare
from nibble.errors import DataError
from nibble.models import load_tokenizer
from nibble.nn.adapters import AdapterSummary
from nibble.nn.attention import PACKED, attention_name
from nibble.place import Group, placement
from nibble.place.activations import Activations
from nibble.place.base import Memory, Placement, out_of_memory_is_explained
from nibble.place.devices import slow_products
from nibble.spec.config import Recipe
from nibble.spec.graphs import wish
from nibble.spec.plan import Plan
from nibble.train.begin import autocast_of, training_state
from nibble.train.checkpoint import TRAINED, Checkpoints
from nibble.train.checks import check_positions, check_schedule
from nibble.train.fitting import fitted
from nibble.train.folder import RunFolder, gather_versions
from nibble.train.loop import Evaluate, Outcome, Settings, loop
from nibble.train.phase_memory import PhaseMemory, overall
from nibble.train.planned import advice, decided, plan_run, to_text
from nibble.train.profile import Profiler
from nibble.train.report import Report
from nibble.train.sinks import SinkContext, make_sinks
from nibble.train.state import TrainState, seed_everything
from nibble.use.assemble import Assembly, assemble, fill
from nibble.use.objective import Objective, held_out_loss, objective
from nibble.weights.adapter_files import load_adapter, save_adapter
from nibble.weights.tensor_file import TensorFile

DATA, PLAN = "data.json", "plan.json"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run as it ended. `plan` is None for a model that cannot be planned."""

    folder: Path
    outcome: Outcome
    summary: AdapterSummary
    plan: Plan | None
    memory: Memory
    phases: Mapping[str, Memory] = field(default_factory=dict)
    """Peaks of each phase, by the plan's names."""


def train(recipe: Recipe, *, resume: bool = False, stream: IO[str] | None = None) -> RunResult:
    """Train as the recipe says, or go on with the run in its folder.

    One of several processes does its share: they find each other in the environment
    (place/group.py), and the first one writes the folder and shows progress.
    `stream`: where progress is shown (default: standard output). Raises a NibbleError for whatever
    cannot be done; a run that was interrupted returns, with `outcome.interrupted`.
    """
    with Group.from_environment(recipe.place) as group:
        recipe, notes = fitted(recipe, group, resume=resume)
        with closing(placement(recipe.place, group, optim=recipe.optim)) as place:
            return _train(recipe, place, group, resume=resume, stream=stream, notes=notes)


def _train(
    recipe: Recipe,
    place: Placement,
    group: Group,
    *,
    resume: bool,
    stream: IO[str] | None,
    notes: Sequence[str],
) -> RunResult:
    # Each process drops other activations; all else that is random has generators of its own.
    seed_everything(recipe.train.seed + group.rank)
    with (
        RunFolder(recipe, resume=resume, group=group) as folder,
        Report(log_every=recipe.train.log_every) as report,
    ):
        versions = gather_versions(seed=recipe.train.seed)
        folder.write_versions(versions)
        if group.is_first:
            slow = slow_products(place.device, recipe.train.precision)
            _show(report, recipe, folder, stream=stream, notes=[*notes, *filter(None, [slow])])
        assembly, splits = _model_and_data(recipe, group, report)
        recipe = assembly.recipe
        folder.write_recipe(recipe)
        folder.write(DATA, _data_text(splits))
        planned = plan_run(assembly, place, group, note=report.note)
        assembly = decided(assembly, planned, note=report.note)
        folder.write_recipe(assembly.recipe)
        phases = PhaseMemory(place)
        with out_of_memory_is_explained(advice(planned, place)):
            state, settings = _load(assembly, splits, place, report)
            checkpoints = Checkpoints(
                folder.path,
                keep=recipe.train.keep_checkpoints,
                versions=versions,
                write_model=_write_model(assembly, state.model),
            )
            if resume and (found := checkpoints.resume(state)) is not None:
                report.note(f"going on from {found}")
            report.begin(first_step=state.step, max_steps=settings.max_steps)
            phases.loaded()
            loss = place.around(
                objective(
                    assembly.built.family,
                    task=recipe.model.task,
                    chunk=recipe.train.loss_chunk_tokens,
                )
            )
            outcome = loop(
                state,
                place=place,
                objective=loss,
                settings=settings,
                report=report,
                checkpoints=checkpoints,
                evaluate=_evaluation(assembly, splits, state.model, place, loss),
                profiler=_profiler(recipe, folder, place, report),
                memory=phases,
            )
        peaks = phases.peaks()
        memory = overall(peaks)
        folder.write(PLAN, to_text(planned, memory, peaks))
        if outcome.interrupted:
            report.note(
                f"stopped after step {outcome.step} of {settings.max_steps}; go on with: "
                f"nibble train {folder.path} --resume"
            )
    return RunResult(
        folder=folder.path,
        outcome=outcome,
        summary=_summary(assembly),
        plan=planned,
        memory=memory,
        phases=peaks,
    )


def _profiler(recipe: Recipe, folder: RunFolder, place: Placement, report: Report) -> Profiler:
    """The profiler of the first process; the others are not profiled."""
    return Profiler(
        recipe.train.profile if place.rank == 0 else None,
        folder=folder.path / "profile",
        device=place.device,
        note=report.note,
    )


def _show(
    report: Report,
    recipe: Recipe,
    folder: RunFolder,
    *,
    stream: IO[str] | None,
    notes: Sequence[str],
) -> None:
    """Let the recipe's sinks see the run, first of all what was decided about it."""
    for sink in make_sinks(recipe.report.sinks, _sink_context(recipe, folder), stream=stream):
        report.add(sink)
    for line in notes:
        report.note(line)


def _sink_context(recipe: Recipe, folder: RunFolder) -> SinkContext:
    last = folder.resumed_from
    return SinkContext(
        run=folder.path,
        step=0 if last is None else int(last.name.rpartition("-")[2]),
        project=recipe.report.project,
        run_name=recipe.report.run_name or folder.path.name,
        recipe=recipe.model_dump(mode="json"),
    )


def _model_and_data(recipe: Recipe, group: Group, report: Report) -> tuple[Assembly, Splits]:
    """The model on meta and the rows. A classifier's head is as wide as the data has labels, so
    there the data come first; elsewhere the family says first whether rows may be packed."""
    if recipe.model.task == "classification":
        splits = _prepare(recipe, load_tokenizer(recipe.model), group, report, can_pack=False)
        resolved = recipe.model.model_copy(update={"num_labels": splits.num_labels})
        with report.phase("build the model"):
            assembly = assemble(recipe.model_copy(update={"model": resolved}))
        _name_labels(assembly, splits)
    else:
        with report.phase("build the model"):
            assembly = assemble(recipe)
        can_pack = assembly.built.family.can_pack
        splits = _prepare(recipe, assembly.tokenizer, group, report, can_pack=can_pack)
    check_positions(assembly, splits)
    keeps_attention = recipe.train.activation_checkpointing == "selective"
    if (recipe.data.packing or keeps_attention) and attention_name(
        type(assembly.model), assembly.built.config
    ) == PACKED:
        assembly.model.set_attn_implementation(PACKED)  # type: ignore[operator]
    summary = _summary(assembly)
    share = summary.num_trainable / max(1, summary.num_total)
    report.note(
        f"trains {summary.num_trainable:,} of {summary.num_total:,} parameters ({share:.2%})"
    )
    if assembly.fused is not None and assembly.fused.lacking:
        lacking = ", ".join(assembly.fused.lacking)
        report.note(f"no fast path for {lacking}: they run as transformers wrote them")
    learnt = {name: p for name, p in assembly.model.named_parameters() if p.requires_grad}
    for line in optim.projection_lines(learnt, recipe.optim):
        report.note(line)
    return assembly, splits


def _summary(assembly: Assembly) -> AdapterSummary:
    assert assembly.summary is not None, "a model that is assembled to be trained"
    return assembly.summary


def _prepare(
    recipe: Recipe, tokenizer: object, group: Group, report: Report, *, can_pack: bool
) -> Splits:
    """The rows: the first process tokenises and keeps them on the disk, the others read them.

    Raises DataError when the processes see different data.
    """
    with report.phase("tokenise") as phase:
        splits = group.first_then_others(
            "the tokenised data",
            lambda: prepare(
                recipe.data,
                tokenizer,
                task=recipe.model.task,
                seed=recipe.train.seed,
                can_pack=can_pack,
                num_labels=recipe.model.num_labels,
                progress=lambda name, done, total: phase.at(done, total, name),
            ),
        )
    for line in splits.report.lines():
        report.note(line)
    sizes = (len(splits.train), int(splits.train.lengths.sum()), splits.num_labels)
    for rank, found in enumerate(group.gather(sizes, "the tokenised data")):
        if found != sizes:
            raise DataError(
                f"rank {group.rank} has {sizes[0]} rows of {sizes[1]} tokens, rank {rank} has "
                f"{found[0]} of {found[1]}: every machine needs the same data and tokenizer"
            )
    return splits


def _name_labels(assembly: Assembly, splits: Splits) -> None:
    """Let the configuration, which exports carry, say what the classes mean."""
    if splits.label_names:
        config = assembly.built.config
        config.id2label = dict(enumerate(splits.label_names))
        config.label2id = {name: number for number, name in enumerate(splits.label_names)}


def _data_text(splits: Splits) -> str:
    told = {
        "train": splits.report.lines(),
        "eval": None if splits.eval_report is None else splits.eval_report.lines(),
        "num_train_rows": len(splits.train),
        "num_eval_rows": 0 if splits.eval is None else len(splits.eval),
        "label_names": splits.label_names,
        "stop_ids": splits.stop_ids,
        "question_prompt": splits.question_prompt,
    }
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _load(
    assembly: Assembly, splits: Splits, place: Placement, report: Report
) -> tuple[TrainState, Settings]:
    """The model with its weights, the loader, the optimiser, and the numbers of the loop."""
    recipe = assembly.recipe
    loader = make_loader(
        splits,
        recipe.data,
        recipe.train,
        rank=place.rank,
        world=place.world,
        pad_id=assembly.tokenizer.pad_token_id,
    )
    max_steps, steps_per_epoch = num_steps(loader, recipe.train)
    check_schedule(recipe, max_steps)
    with report.phase("load weights") as phase:
        model = fill(
            assembly,
            place,
            activations=Activations.of(recipe.train),
            advance=lambda done, total: phase.at(done, total),
            note=report.note,
        )
    if recipe.adapter.path is not None:
        load_adapter(model, Path(recipe.adapter.path), put=place.put_)
    state = training_state(recipe, model, place, loader, total_steps=max_steps)
    settings = Settings(
        max_steps=max_steps,
        steps_per_epoch=steps_per_epoch,
        max_grad_norm=recipe.optim.max_grad_norm,
        eval_every=recipe.train.eval_every,
        save_every=recipe.train.save_every,
        log_every=recipe.train.log_every,
        graphs=wish(recipe),
        is_language=recipe.model.task == "causal-lm",
        autocast=autocast_of(recipe),
    )
    return state, settings


def _evaluation(
    assembly: Assembly, splits: Splits, model: nn.Module, place: Placement, loss: Objective
) -> Evaluate | None:
    rows, recipe = splits.eval, assembly.recipe
    if rows is None:
        return None

    def evaluate(stop: Callable[[], bool]) -> float | None:
        batches = one_pass(
            rows,
            micro_batch_size=recipe.train.micro_batch_size,
            rank=place.rank,
            world=place.world,
            packing=recipe.data.packing,
            max_length=recipe.data.max_length,
            pad_id=assembly.tokenizer.pad_token_id,
        )
        return held_out_loss(model, batches, place=place, objective=loss, stop=stop)

    return evaluate


def _write_model(assembly: Assembly, model: nn.Module) -> Callable[[Path], None] | None:
    """Files of a checkpoint that other tools read: an adapter as peft's."""
    recipe = assembly.recipe
    if recipe.adapter.kind not in ("lora", "dora"):
        return None
    return lambda folder: save_adapter(
        model,
        folder,
        base_name=recipe.model.path,
        adapter=recipe.adapter,
        task=recipe.model.task,
        values=TensorFile(folder / TRAINED),
    )
