"""Texts of a source in order, from any position on: what a stream is read from.

A position is plain data, so that it can lie in a checkpoint: the source and the file, how many of
its rows were read, and for a data set of the hub what `datasets` says of where it is. Documents
come in chunks and positions are those of chunks; who needs a document within one counts from its
beginning. Reading on costs reading a local file again up to the position, without tokenising it;
a hub data set goes to the shard and row by itself.

Rows that hold no text are counted and left out, as everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nibble.data.formats import Document, Reader, choose
from nibble.data.hub import HubSet, open_source
from nibble.data.report import EMPTY, MALFORMED, RowProblem, Tally
from nibble.data.sources import BadRecord, Record, SourceFile
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Source

CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 1 << 22

Position = dict[str, Any]
"""{"source", "file", "row": the next row of the file, "taken": rows read of the source, "hub": the
library's own state or None}"""
START: Position = {"source": 0, "file": 0, "row": 0, "taken": 0, "hub": None}


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some documents that follow each other, and where the first of them is."""

    at: Position
    texts: list[str]


@dataclass(kw_only=True)
class Documents:
    """The texts of several sources, one after the other."""

    sources: Sequence[Source]
    max_length: int
    tally: Tally = field(default_factory=Tally)

    def chunks(self, at: Position = START) -> Iterator[Chunk]:
        """Every chunk from a position on; a position must be one that a chunk had.

        Raises DataError for a source that cannot be read, ConfigError for one that holds no texts.
        """
        for number in range(at["source"], len(self.sources)):
            source = self.sources[number]
            files = open_source(source, max_length=self.max_length)
            here = at if number == at["source"] else {**START, "source": number}
            taken = here["taken"]
            for index in range(here["file"], len(files)):
                row = here["row"] if index == here["file"] else 0
                start = {**here, "file": index, "row": row, "taken": taken}
                left = None if source.num_rows is None else max(0, source.num_rows - taken)
                for chunk, num_rows in self._of_file(files[index], source, start, left):
                    taken += num_rows
                    yield chunk

    def _of_file(
        self, file: SourceFile, source: Source, start: Position, left: int | None
    ) -> Iterator[tuple[Chunk, int]]:
        """Chunks of one file and how many rows each took; at most `left` rows."""
        if not isinstance(file, HubSet):
            rows = itertools.islice(file.records(), start["row"], None)
            yield from self._chunks(itertools.islice(rows, left), source, file.name, start)
            return
        stream = file.stream(start["hub"])
        state = start["hub"]
        some = itertools.islice(stream.records(), left)
        for chunk, num_rows in self._chunks(some, source, file.name, start):
            after = stream.state()
            yield Chunk(at={**chunk.at, "hub": state}, texts=chunk.texts), num_rows
            state = after

    def _chunks(
        self,
        rows: Iterator[Record | BadRecord],
        source: Source,
        name: str,
        start: Position,
    ) -> Iterator[tuple[Chunk, int]]:
        reader: Reader | None = None
        row = first = start["row"]
        while True:
            texts: list[str] = []
            begin, characters = row, 0
            for record in rows:
                row += 1
                if isinstance(record, Record) and reader is None:
                    reader = _reader(source, record, name)
                text = self._text(reader, record)
                if text is not None:
                    texts.append(text)
                    characters += len(text)
                if row - begin >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
                    break
            if row == begin:
                return
            at = {**start, "row": begin, "taken": start["taken"] + begin - first}
            yield Chunk(at=at, texts=texts), row - begin

    def _text(self, reader: Reader | None, record: Record | BadRecord) -> str | None:
        self.tally.num_read += 1
        try:
            if isinstance(record, BadRecord):
                raise RowProblem(MALFORMED, record.detail)
            assert reader is not None
            example = reader.read(record.values)
            assert isinstance(example, Document)
            return example.text
        except RowProblem as problem:
            fate = EMPTY if problem.fate == EMPTY else MALFORMED
            self.tally.add(fate, file=0, line=record.line, detail=problem.detail)
            return None


def _reader(source: Source, first: Record, name: str) -> Reader:
    wanted = source if source.format != "auto" else source.model_copy(update={"format": "text"})
    if wanted.format != "text":
        raise ConfigError(
            f"data.streaming reads texts, and {source.path} has format={source.format}: use "
            "format=text, or streaming=false"
        )
    try:
        return choose(wanted, [first.values], task="causal-lm", name=name)
    except DataError as error:
        raise DataError(f"{error} (data.streaming reads texts)") from None
