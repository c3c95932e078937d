"""One source to rows: read, recognise, render, tokenise in batches, count what falls out.

The work of a source depends on nothing but the source, the tokenizer and a few words of the recipe,
so its result can be kept (`cache.py`). Labels stay as they are in the file until all sources have
been read (`labels.py`), since only together do they say how many classes there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nibble.data.chat import Rendered
from nibble.data.encode import Encoded, Encoder, too_long_error
from nibble.data.formats import Document, Example, Labelled, Reader, choose
from nibble.data.report import MALFORMED, TOO_LONG, RowProblem, Tally
from nibble.data.rows import Rows
from nibble.data.sources import BadRecord, Record, SourceFile
from nibble.errors import DataError
from nibble.spec.config import Source

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many rows are done, and how many there are if known."""

BATCH_ROWS = 512
BATCH_CHARACTERS = 4_000_000
NUM_SAMPLES = 32
"""Rows that are looked at to recognise a format."""

RawLabel = str | int | float


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenised:
    """The rows of one source, its tally, the labels as the file has them, and the ids of the
    tokens that end answers."""

    rows: Rows
    tally: Tally
    raw_labels: list[RawLabel] = field(default_factory=list)
    stop_ids: tuple[int, ...] = ()


@dataclass
class _Store:
    """Rows while they are collected."""

    ids: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    type_ids: list[Any] = field(default_factory=list)
    file_of: list[int] = field(default_factory=list)
    line_of: list[int] = field(default_factory=list)
    raw_labels: list[RawLabel] = field(default_factory=list)
    stop_ids: set[int] = field(default_factory=set)

    def add(self, row: Encoded, *, file: int, line: int) -> None:
        self.ids.append(row.ids)
        self.targets.append(row.targets)
        self.file_of.append(file)
        self.line_of.append(line)
        if row.type_ids is not None:
            self.type_ids.append(row.type_ids)
        if row.label is not None:
            self.raw_labels.append(row.label)

    def rows(self, files: tuple[str, ...]) -> Rows:
        def flat(parts: list[Any], dtype: Any) -> torch.Tensor:
            joined = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
            return torch.from_numpy(np.ascontiguousarray(joined, dtype=dtype))

        lengths = np.asarray([0, *map(len, self.ids)], dtype=np.int64)
        return Rows(
            ids=flat(self.ids, np.int32),
            targets=flat(self.targets, np.bool_),
            offsets=torch.from_numpy(lengths.cumsum()),
            files=files,
            file_of=torch.tensor(self.file_of, dtype=torch.int32),
            line_of=torch.tensor(self.line_of, dtype=torch.int64),
            # All 0 is what models assume, and some do not take the word at all.
            type_ids=flat(self.type_ids, np.uint8) if any(map(np.any, self.type_ids)) else None,
        )


def read_records(
    files: Sequence[SourceFile], *, num_rows: int | None
) -> Iterator[tuple[int, Record | BadRecord]]:
    """(file number, record) of all files; stops after `num_rows` that could be read.

    DataError for a file without a single row.
    """
    taken = 0
    for number, file in enumerate(files):
        empty = True
        for record in file.records():
            empty = False
            yield number, record
            taken += isinstance(record, Record)
            if taken == num_rows:
                return
        if empty:
            raise DataError(f"{file.name} is empty")


def read_examples(
    source: Source, files: Sequence[SourceFile], *, task: str, tally: Tally
) -> Iterator[tuple[int, int, Example]]:
    """(file number, line, example) of a source; what cannot be read goes to the tally."""
    records = read_records(files, num_rows=source.num_rows)
    head = list(itertools.islice(records, NUM_SAMPLES))
    samples = [record.values for _, record in head if isinstance(record, Record)]
    while not samples:  # nothing readable so far: look on, then give up by name
        more = list(itertools.islice(records, NUM_SAMPLES))
        if not more:
            number, bad = head[0]
            assert isinstance(bad, BadRecord)
            raise DataError(
                f"no row of {source.path} can be read; the first: "
                f"{files[number].name}:{bad.line}: {bad.detail}"
            )
        head += more
        samples = [record.values for _, record in more if isinstance(record, Record)]
    reader = choose(source, samples, task=task, name=files[0].name)
    tally.note(reader.note)
    for number, record in itertools.chain(head, records):
        tally.num_read += 1
        example = _example(reader, record)
        if isinstance(example, RowProblem):
            tally.add(example.fate, file=number, line=record.line, detail=example.detail)
        else:
            yield number, record.line, example


def _example(reader: Reader, record: Record | BadRecord) -> Example | RowProblem:
    if isinstance(record, BadRecord):
        return RowProblem(MALFORMED, record.detail)
    try:
        return reader.read(record.values)
    except RowProblem as problem:
        return problem


def tokenise_source(
    source: Source,
    files: Sequence[SourceFile],
    *,
    encoder: Encoder,
    task: str,
    progress: Progress | None = None,
) -> Tokenised:
    """All rows of a source that can be learnt. Raises DataError by name for a source that cannot
    be read, and for a row that is too long when the recipe wants that."""
    tally, store = Tally(), _Store()
    names = tuple(file.name for file in files)
    pending: list[tuple[int, int, Example]] = []
    characters = 0
    for item in read_examples(source, files, task=task, tally=tally):
        pending.append(item)
        characters += _size(item[2])
        if len(pending) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            _flush(pending, encoder=encoder, store=store, tally=tally, names=names)
            pending, characters = [], 0
            if progress is not None:
                progress(f"tokenise {source.path}", tally.num_read, source.num_rows)
    if pending:
        _flush(pending, encoder=encoder, store=store, tally=tally, names=names)
    if progress is not None:
        progress(f"tokenise {source.path}", tally.num_read, tally.num_read)
    if store.stop_ids:
        shown = encoder.tokenizer.convert_ids_to_tokens(sorted(store.stop_ids))
        tally.note(f"{names[0]}: answers end with {', '.join(shown)}")
    return Tokenised(
        rows=store.rows(names),
        tally=tally,
        raw_labels=store.raw_labels,
        stop_ids=tuple(sorted(store.stop_ids)),
    )


def _size(example: Example) -> int:
    return len(example.text) if isinstance(example, Document | Labelled) else 0


def _flush(
    pending: list[tuple[int, int, Example]],
    *,
    encoder: Encoder,
    store: _Store,
    tally: Tally,
    names: tuple[str, ...],
) -> None:
    places: list[tuple[int, int]] = []
    labelled = [example for _, _, example in pending if isinstance(example, Labelled)]
    if labelled:
        places = [(file, line) for file, line, _ in pending]
        encoded = [[row] for row in encoder.encode_labelled(labelled)]
    else:
        rendered: list[Rendered] = []
        for file, line, example in pending:
            try:
                rendered.append(encoder.render(example))
                places.append((file, line))
            except RowProblem as problem:
                tally.add(problem.fate, file=file, line=line, detail=problem.detail)
        if not rendered:
            return
        document = isinstance(pending[0][2], Document)
        chat = not document and encoder.template is not None
        encoded = encoder.encode(rendered, chat=chat, document=document)
        if not document:
            _collect_stops(encoded, store)
    for (file, line), rows in zip(places, encoded, strict=True):
        for row in rows:
            tally.longest = max(tally.longest, row.length)
            if row.fate is not None:
                if row.fate == TOO_LONG and encoder.data.too_long == "error":
                    raise too_long_error(row, f"{names[file]}:{line}")
                tally.add(row.fate, file=file, line=line, detail=row.detail)
            if row.kept:
                store.add(row, file=file, line=line)


def _collect_stops(encoded: list[list[Encoded]], store: _Store) -> None:
    """The last learnt token of every whole answer row: what the model learns to stop with."""
    for rows in encoded:
        for row in rows:
            if row.fate is None:
                learnt = row.ids[row.targets]
                store.stop_ids.add(int(learnt[-1]))
