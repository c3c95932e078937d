"""Where rows come from: local files, folders of them, and what the other source kinds share.

A file yields records, one dict of columns each with its line; a row that cannot be read yields a
`BadRecord` instead, so that one broken line neither stops a run nor disappears. A file that cannot
be read at all (missing, empty, cut short) is a DataError. Readers stream, but for .json, which must
be parsed whole. The .tsv reader takes quotes literally, as GLUE writes them; .csv is RFC 4180.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import gzip
import hashlib
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from nibble.errors import ConfigError, DataError
from nibble.spec.config import Source

COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
}
END_OF_DOCUMENT = "<|endofdoc|>"
"""A line of a .txt file that is exactly this ends a document."""
BROKEN_FILE = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of one row and the line (or number) of it in its file, from 1."""

    values: dict[str, Any]
    line: int


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A row that could not be read."""

    detail: str
    line: int


Records = Iterator[Record | BadRecord]


class SourceFile(Protocol):
    """One file of a source, or a hub data set."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def digest(self) -> str | None:
        """A hash of the content; None if it cannot be known without reading everything anew."""
        ...

    def records(self) -> Records:
        """Read it from the start."""
        ...


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file on this machine. `columns` decides whether a table has a header line."""

    path: Path
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The path as it was given."""
        return str(self.path)

    def digest(self) -> str:
        """sha256 of the bytes, and of the kind of file they are."""
        try:
            with self.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
        return f"{kind(self.path)} {digest}"

    def records(self) -> Records:
        """Read it from the start; a DataError when the file as a whole cannot be read."""
        try:
            yield from READERS[kind(self.path)](self)
        except BROKEN_FILE as error:
            raise DataError(
                f"{self.path} cannot be read to its end ({error}): is it cut short or damaged?"
            ) from None

    def open(self) -> IO[bytes]:
        """The file, decompressed if its name says so."""
        opened = COMPRESSIONS.get(self.path.suffix)
        if opened is None:
            return self.path.open("rb")
        stream: IO[bytes] = opened(self.path)
        return stream


def kind(path: Path) -> str:
    """The suffix that says how a file is read: .jsonl for rows.jsonl.xz; "" if there is none."""
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return inner.suffix.lower() if inner.suffix.lower() in READERS else ""


def local_files(source: Source) -> list[LocalFile] | None:
    """The files of a local source in the order of their names; None if it is a hub data set.

    A path is local if it exists, ends like a data file or lies in a folder that exists; then it
    must exist. DataError names the nearest existing files.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(child for child in path.iterdir() if child.is_file() and kind(child))
        if not found:
            raise DataError(f"the folder {path} holds no data file (one of {_endings()})")
    elif path.is_file():
        if not kind(path):
            raise DataError(f"{path} is not a data file nibble can read: use one of {_endings()}")
        found = [path]
    elif kind(path) or len(path.parts) != 2 or path.is_absolute() or path.parent.is_dir():
        if len(path.parts) == 1 and not kind(path):
            return None
        raise DataError(_missing(path))
    else:
        return None
    for name in ("name", "split"):
        if getattr(source, name) is not None:
            raise ConfigError(
                f"data source {source.path}: {name} belongs to hub data sets and this is a local "
                "file; remove it"
            )
    return [LocalFile(path=file, columns=source.columns) for file in found]


def _endings() -> str:
    return ", ".join(READERS) + "; each also .xz, .gz, .bz2"


def _missing(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    lost = path.relative_to(folder).parts[0]
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(lost, names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(near)}?" if near else f": {folder} has nothing like it"
    return f"{path} does not exist{hint}"


def _text_lines(file: LocalFile) -> Iterator[tuple[int, str | None]]:
    """Numbered lines without their ends; None for a line that is not UTF-8."""
    with file.open() as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, None


def _read_jsonl(file: LocalFile) -> Records:
    for number, line in _text_lines(file):
        if line is None:
            yield BadRecord("not UTF-8", number)
        elif line.strip():
            try:
                yield _object(json.loads(line), number)
            except (json.JSONDecodeError, RecursionError) as error:
                yield BadRecord(f"not JSON ({error})", number)


def _object(value: Any, number: int) -> Record | BadRecord:
    if isinstance(value, dict):
        return Record(value, number)
    return BadRecord(f"a JSON {type(value).__name__} where an object is wanted", number)


def _read_json(file: LocalFile) -> Records:
    with file.open() as stream:
        raw = stream.read()
    try:
        value = json.loads(raw.decode("utf-8-sig")) if raw.strip() else []
    except UnicodeDecodeError:
        raise DataError(f"{file.name} is not UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line: JSONL under another name
            yield from _read_jsonl(file)
            return
        raise DataError(
            f"{file.name}:{error.lineno} is not JSON ({error.msg}, column {error.colno})"
        ) from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise DataError(
            f'{file.name} holds one JSON {type(value).__name__}; a list or {{"data": [...]}} '
            "of objects is wanted"
        )
    for number, row in enumerate(value, start=1):
        yield _object(row, number)


def _read_csv(file: LocalFile) -> Records:
    yield from _read_table(file, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(file: LocalFile) -> Records:
    yield from _read_table(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(file: LocalFile, *, delimiter: str, quoting: int) -> Records:
    """A table with a header line, unless every renamed column is a number: then columns are
    counted from 0."""
    # Bytes that are not UTF-8 become lone surrogates, which no valid text holds.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    names: list[str] | None = None
    headless = bool(file.columns) and all(name.isdigit() for name in file.columns.values())
    with io.TextIOWrapper(
        file.open(), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRecord(f"not a row of a table ({error})", line)
                continue
            if not cells:
                continue
            if names is None:
                names = [str(i) for i in range(len(cells))] if headless else cells
                if not headless:
                    continue
            if len(cells) != len(names):
                yield BadRecord(f"{len(cells)} columns where {len(names)} are wanted", line)
            elif any(re.search("[\ud800-\udfff]", cell) for cell in cells):
                yield BadRecord("not UTF-8", line)
            else:
                yield Record(dict(zip(names, cells, strict=True)), line)


def _read_txt(file: LocalFile) -> Records:
    """Documents, each ended by a line END_OF_DOCUMENT or the end of the file."""
    lines: list[str] = []
    begin, valid = 1, True

    def document() -> Record | BadRecord:
        text = "\n".join(lines).strip("\n")
        return Record({"text": text}, begin) if valid else BadRecord("not UTF-8", begin)

    for number, line in _text_lines(file):
        if line == END_OF_DOCUMENT:
            yield document()
            lines, begin, valid = [], number + 1, True
        elif line is None:
            valid = False
        else:
            lines.append(line)
    if not valid or any(lines):
        yield document()


def _read_parquet(file: LocalFile) -> Records:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{file.name}: reading .parquet needs pyarrow, which comes with: "
            'pip install "nibble[data]"'
        ) from None
    number = 0
    try:
        with file.open() as stream, parquet.ParquetFile(stream) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, number)
    except arrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file.name} is not a whole parquet file ({reason})") from None


READERS: dict[str, Callable[[LocalFile], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
