"""A checkpoint as a stream of (parameter name, value), one tensor in host memory at a time.

Before the first byte of data is read everything is compared: names, shapes and types of the
checkpoint with those of the model as its family defines it. Then tensors come in the order of the
model, under the model's names: renamed, experts merged, Conv1D weights the right way round, tied
parameters once under their first name. What an old checkpoint holds too much (stored rotary
frequencies, causal masks) is dropped; anything else unknown, missing or of another shape is a
WeightError.

The stream costs one read of the file. It does not touch the model: whoever takes the values puts
them where they belong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from nibble.errors import WeightError
from nibble.nn.quant import PackedWeight
from nibble.weights.conversion import Job, make_jobs, run_job
from nibble.weights.source import Entry, Source

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STALE = (
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)position_ids$",
    r"(attn|attention|self_attention)\.(bias|masked_bias)$",
    r"(attn|attention)\.embed_positions$",
    r"rope\.freqs$",
)
"""Computed buffers that older versions of transformers stored; `attn.bias` only where the model has
no such parameter."""

Value = Tensor | PackedWeight
TargetsOf = Callable[[str], Iterable[str]]
RowsOf = Callable[[str], slice | None]
Initialise = Callable[[Sequence[str], int], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a stream will do: counts for a progress bar, and what a person should be told.

    `initialised` are parameters of a new head that start at random; `ignored` are tensors of the
    checkpoint that are not used.
    """

    num_tensors: int
    num_bytes: int
    initialised: tuple[str, ...]
    ignored: tuple[str, ...]


def open_weights(path: Path | str) -> Source:
    """Open a safetensors folder (bitsandbytes' quantised ones included) or a .gguf file; headers
    only are read."""
    path = Path(path)
    if path.suffix == ".gguf":
        from nibble.weights.gguf_source import GgufSource

        return GgufSource(path)
    from nibble.weights.bnb_source import STATE_SUFFIX, BnbSource
    from nibble.weights.safetensors_source import SafetensorsSource

    source = SafetensorsSource(path)
    if any(STATE_SUFFIX in name or name.endswith(".SCB") for name in source.entries()):
        return BnbSource(source)
    return source


def stream(
    source: Source,
    model: nn.Module,
    *,
    transposed: frozenset[str] = frozenset(),
    targets_of: TargetsOf | None = None,
    initialise: Initialise | None = None,
    seed: int = 0,
) -> Stream:
    """Check a source against a model's skeleton and return the stream of its values.

    `model` is on meta and unchanged since it was built. `transposed`: weights that the checkpoint
    stores as [in, out]. `targets_of(name)` gives the names under which a parameter is wanted (block
    expansion); default: its own. `initialise` makes values for a head that the checkpoint lacks
    (then missing heads are allowed, and another task's head is ignored). Values keep the
    checkpoint's type. Raises WeightError before any data is read.
    """
    return Stream(
        source,
        model,
        transposed=transposed,
        targets_of=targets_of,
        initialise=initialise,
        seed=seed,
    )


class Stream:
    """An iterable of (parameter name, value); `report` says beforehand what it holds."""

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        *,
        transposed: frozenset[str],
        targets_of: TargetsOf | None,
        initialise: Initialise | None,
        seed: int,
    ) -> None:
        """See `stream`."""
        self._source = source.bind(model)
        self._model = model
        self._transposed = transposed
        self._targets_of: TargetsOf = targets_of or (lambda name: (name,))
        self._initialise = initialise
        self._seed = seed
        self._entries = self._source.entries()
        self._expected: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
        self._first = _first_names(self._expected)
        jobs, unmatched = make_jobs(list(self._entries), model, native=self._source.native)
        self._copies: dict[str, str] = {}
        self._jobs = self._without_aliases(jobs)
        ignored = self._check_unmatched(unmatched)
        for job in self._jobs:
            self._check_job(job)
        initialised = self._check_missing()
        self.report = LoadReport(
            num_tensors=sum(len(job.targets) for job in self._jobs) + len(initialised),
            num_bytes=sum(self._num_bytes(name) for job in self._jobs for name, _ in job.pieces),
            initialised=tuple(initialised),
            ignored=tuple(ignored),
        )

    def __len__(self) -> int:
        """Parameters that will come, before block expansion multiplies them."""
        return self.report.num_tensors

    def __iter__(self) -> Iterator[tuple[str, Value]]:
        """Read and yield; a value may be yielded under several names."""
        return self.only(lambda name: True)

    def only(
        self, wanted: Callable[[str], bool], rows: RowsOf | None = None
    ) -> Iterator[tuple[str, Value]]:
        """The same for the parameters whose name is wanted; nothing else is read.

        `rows(name)`: the rows that are enough of a parameter (None: all). Where one tensor of the
        checkpoint is one parameter the right way round only they are read, and of no rows nothing;
        what is turned, cut or fused comes whole.
        """
        for job in self._jobs:
            names = [self._first[target] for target in job.targets]
            targets = {name: self._wanted_targets(name, wanted) for name in names}
            if not any(targets.values()):
                continue
            flat = [target for some in targets.values() for target in some]
            enough = None if rows is None else _common(rows(target) for target in flat)
            if enough is not None and enough.start == enough.stop:
                for target in flat:
                    yield target, torch.empty(0, *self._expected_shape(job)[1:])
                continue
            for name, value in self._values(job, enough):
                for target in targets[name]:
                    yield target, value
                del value
        fresh_names = [n for n in self.report.initialised if self._wanted_targets(n, wanted)]
        if fresh_names and self._initialise is not None:
            for name, fresh in self._initialise(fresh_names, self._seed):
                for target in self._wanted_targets(name, wanted):
                    yield target, fresh

    def _wanted_targets(self, name: str, wanted: Callable[[str], bool]) -> list[str]:
        return [target for target in self._targets_of(name) if wanted(target)]

    def _expected_shape(self, job: Job) -> tuple[int, ...]:
        return tuple(self._expected[job.targets[0]].shape)

    def _values(self, job: Job, rows: slice | None) -> Iterator[tuple[str, Value]]:
        if not job.is_plain:
            made = run_job(job, self._read_dense, self._model, where=self._source.describe())
            for name, tensor in made:
                self._check_shape(name, tuple(tensor.shape), job.pieces[0][0])
                yield self._first[name], tensor
            return
        name, piece = self._first[job.targets[0]], job.pieces[0][0]
        is_turned = job.targets[0] in self._transposed
        rows = None if is_turned else rows
        value = self._source.read(piece, rows)
        if isinstance(value, Tensor):
            if name in self._copies:
                self._check_tie(name, value, rows)
            if is_turned:
                value = value.t()
        yield name, value

    def _read_dense(self, name: str) -> Tensor:
        value = self._source.read(name)
        assert isinstance(value, Tensor), name  # packed pieces were refused by _check_job
        return value

    def _without_aliases(self, jobs: list[Job]) -> list[Job]:
        """One job per tied parameter; a second stored copy is remembered, to be compared."""
        kept: dict[str, Job] = {}
        for job in jobs:
            first = self._first[job.targets[0]]
            if first in kept:
                self._copies[first] = job.pieces[0][0]
            else:
                kept[first] = job
        # A tied parameter may be stored under its second name: it still comes in its first place.
        return [kept[first] for first in dict.fromkeys(self._first.values()) if first in kept]

    def _check_tie(self, name: str, value: Tensor, rows: slice | None) -> None:
        other = self._source.read(self._copies[name], rows)
        if isinstance(other, Tensor) and not torch.equal(other, value):
            raise WeightError(
                f"{self._source.describe()}: config.json ties {self._copies[name]} to {name}, "
                "but they differ: "
                "set tie_word_embeddings to false in config.json"
            )

    def _check_job(self, job: Job) -> None:
        for name, _ in job.pieces:
            entry = self._entries[name]
            wanted = self._expected[job.targets[0]]
            if entry.packed and not job.is_plain:
                raise WeightError(
                    f"{self._source.describe()}: {name} is quantised and one part of "
                    f"{job.targets[0]}: take the "
                    "original model and set quant.format"
                )
            if wanted.is_floating_point() and not entry.packed and entry.dtype not in FLOATS:
                raise WeightError(
                    f"{self._source.describe()}: {name} is stored as {_word(entry.dtype)}, "
                    "where a weight must be "
                    "float32, float16 or bfloat16: the checkpoint is quantised in a way that "
                    "nibble does not read"
                )
        if job.is_plain:
            piece = job.pieces[0][0]
            shape = self._entries[piece].shape
            if job.targets[0] in self._transposed and not self._entries[piece].packed:
                shape = shape[::-1]
            self._check_shape(job.targets[0], shape, piece)

    def _check_shape(self, name: str, shape: tuple[int, ...], piece: str) -> None:
        wanted = tuple(self._expected[name].shape)
        if shape != wanted:
            raise WeightError(
                f"{self._source.describe()}: {piece} is {list(shape)}, but {name} needs "
                f"{list(wanted)}: "
                "config.json and the weights do not belong together"
            )

    def _check_unmatched(self, unmatched: list[str]) -> list[str]:
        patterns = [*STALE, *(getattr(self._model, "_keys_to_ignore_on_load_unexpected", ()) or ())]
        stale = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
        unexpected = [name for name in unmatched if not stale.search(name)]
        if unexpected and self._initialise is None:
            raise WeightError(
                f"{self._source.describe()} holds {len(unexpected)} tensors that "
                f"{type(self._model).__name__} does "
                f"not have: {_some(unexpected)}: config.json and the weights do not belong together"
            )
        blocks = [name for name in unexpected if re.search(r"\.\d+\.", name)]
        if blocks:
            # Another task's head may be dropped; a part of the body may not.
            raise WeightError(
                f"{self._source.describe()} holds tensors that {type(self._model).__name__} "
                "does not have: "
                f"{_some(blocks)}: config.json and the weights do not belong together"
            )
        return unmatched

    def _check_missing(self) -> list[str]:
        given = {self._first[target] for job in self._jobs for target in job.targets}
        missing = [name for name in dict.fromkeys(self._first.values()) if name not in given]
        patterns = getattr(self._model, "_keys_to_ignore_on_load_missing", ()) or ()
        if patterns:
            optional = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
            missing = [
                name
                for name in missing
                if not optional.search(name) or isinstance(self._expected[name], nn.Parameter)
            ]
        prefix = f"{self._model.base_model_prefix}."
        head = [n for n in missing if not n.startswith(prefix) or ".pooler." in n]
        if self._initialise is not None and given and len(head) == len(missing):
            return head
        lacking = missing if self._initialise is None else [n for n in missing if n not in head]
        if lacking:
            raise WeightError(
                f"{self._source.describe()} lacks {len(lacking)} of "
                f"{len(set(self._first.values()))} tensors that "
                f"{type(self._model).__name__} needs: {_some(lacking)}: it is another model's "
                "or incomplete"
            )
        return []

    def _num_bytes(self, name: str) -> int:
        entry: Entry = self._entries[name]
        return prod(entry.shape) * entry.dtype.itemsize


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name, the first name of the same tensor: tied parameters have several."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in state.items()}


def _common(asked: Iterable[slice | None]) -> slice | None:
    """The rows that all ask for; None, which is all of them, where they ask for different ones."""
    first, *others = asked
    return first if all(other == first for other in others) else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
