"""Which tensors of a checkpoint make which parameters of a model, in transformers' own terms.

transformers 5 renames and reshapes on load: its conversion mapping holds renamings
(`block_sparse_moe` to `mlp`) and converters, chains of operations from several tensors to one or
from one to several (a Mixtral's experts to one [experts, 2 ffn, hidden] parameter). Its loader
collects a whole model; here the same mapping makes a list of jobs, each of which reads its own
pieces. Merging experts, by far the commonest chain, writes piece after piece into the target, so
its peak is one target and one piece; other chains run the library's own operations on one target's
pieces at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import WeightError

MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(kw_only=True)
class Job:
    """One read, or one conversion: `pieces` are (checkpoint name, pattern of the converter that it
    matched).

    `targets` are the model's names; a plain read has one target, one piece and no converter.
    """

    targets: tuple[str, ...]
    converter: Any = None
    pieces: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether one tensor becomes one parameter unchanged."""
        return self.converter is None


def make_jobs(
    names: Sequence[str], model: nn.Module, *, native: bool
) -> tuple[list[Job], list[str]]:
    """Assign each checkpoint name to a job, in the order of the model's parameters; and the names
    that match nothing.

    `native` names are the model's own. Raises WeightError when two tensors claim one parameter.
    """
    known = model.state_dict()
    jobs: dict[str, Job] = {}
    unmatched = []
    rename = (lambda name: (name, None, None)) if native else _renamer(model, known)
    for name in sorted(names, key=_natural):
        target, pattern, converter = rename(name)
        if target not in known:
            unmatched.append(name)
            continue
        if converter is None:
            if target in jobs:
                raise WeightError(
                    f"{jobs[target].pieces[0][0]} and {name} both claim the parameter {target}"
                )
            jobs[target] = Job(targets=(target,), pieces=[(name, "")])
            continue
        job = jobs.get(target)
        if job is None:
            job = jobs[target] = Job(
                targets=_targets(target, converter, known), converter=copy.deepcopy(converter)
            )
        job.pieces.append((name, pattern or ""))
    order = {name: position for position, name in enumerate(known)}
    return sorted(jobs.values(), key=lambda job: order[job.targets[0]]), unmatched


def run_job(
    job: Job, read: Callable[[str], Tensor], model: nn.Module, *, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Read a converted job's pieces and yield its parameters. Raises WeightError when the pieces do
    not fit."""
    merged = _merge_in_place(job, read, model)
    if merged is not None:
        yield job.targets[0], merged
        return
    converter = job.converter
    for name, pattern in job.pieces:
        # A callable is read by the library just before the operations need it.
        converter.add_tensor(job.targets[0], name, pattern, lambda name=name: read(name))
    try:
        made = converter.convert(job.targets[0], model=model, config=model.config)
    except WeightError:
        raise
    except Exception as error:
        # An operation meets shapes it was not made for: the checkpoint is at fault, not the caller.
        raise WeightError(
            f"{where}: {job.pieces[0][0]} cannot be converted to {job.targets[0]} ({error})"
        ) from None
    for name, value in made.items():
        yield name, value[0] if isinstance(value, list) else value


def _renamer(
    model: nn.Module, known: dict[str, Tensor]
) -> Callable[[str], tuple[str, str | None, Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None, Any]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            # A renaming for an older layout also matches the new one: the name was right already.
            return name, None, None
        return target, pattern, None if pattern is None else by_pattern[pattern]

    return rename


def _targets(first: str, converter: Any, known: dict[str, Tensor]) -> tuple[str, ...]:
    """All parameters that a converter makes, as far as its patterns tell; `first` is the one that
    names matched."""
    patterns = list(converter.target_patterns)
    others = [first.replace(patterns[0], pattern) for pattern in patterns[1:]]
    return (first, *(name for name in others if name in known and name != first))


def _merge_in_place(job: Job, read: Callable[[str], Tensor], model: nn.Module) -> Tensor | None:
    """Stack experts (and concatenate gate and up) into one preallocated tensor; None when the job
    is something else."""
    operations = job.converter.operations
    dims = [getattr(operation, "dim", None) for operation in operations]
    kinds = [type(operation).__name__ for operation in operations]
    if kinds not in MERGES or dims != [0, 1][: len(dims)] or len(job.targets) != 1:
        return None
    patterns = list(job.converter.source_patterns)
    groups = [[name for name, found in job.pieces if found == pattern] for pattern in patterns]
    if len({len(group) for group in groups}) != 1 or (len(patterns) > 1) != (len(kinds) > 1):
        return None
    shape = model.get_parameter(job.targets[0]).shape
    target: Tensor | None = None
    start = 0
    for group in groups:
        rows = 0
        for expert, name in enumerate(group):
            piece = read(name)
            if target is None:
                target = torch.empty(shape, dtype=piece.dtype)
            rows = piece.shape[0]
            fits = len(group) == shape[0] and start + rows <= shape[1]
            if not fits or piece.shape[1:] != shape[2:]:
                raise WeightError(
                    f"{name} is {list(piece.shape)}, one of {len(group)}; it does not fit "
                    f"{job.targets[0]} of {list(shape)}"
                )
            target[expert, start : start + rows] = piece
        start += rows
    if start != shape[1]:
        raise WeightError(f"{job.targets[0]} needs {shape[1]} rows an expert and gets {start}")
    return target


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key in which layer 10 comes after layer 9: experts are stacked in this order."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))
