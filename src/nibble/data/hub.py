"""Sources that are not files here: data sets of the hub, and rows made on the spot.

`datasets` does the fetching, streaming when only the first rows are wanted. Its many failures (no
network, no such set, a configuration to be chosen) become one line. A loading script of a data set
is never run: the library of today has no such thing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from nibble.data.sources import Record, Records, SourceFile, local_files
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Source

BUILTIN = "builtin:"
DUMMY_ROWS = 512
DUMMY_TEXT = "The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True, kw_only=True)
class Dummy:
    """Rows of one repeated sentence, at least `max_length` words each: for measuring memory."""

    num_rows: int
    max_length: int

    @property
    def name(self) -> str:
        """As a recipe names it."""
        return f"{BUILTIN}dummy"

    def digest(self) -> str:
        """The numbers that make the text."""
        return f"dummy {self.num_rows} {self.max_length} {DUMMY_TEXT}"

    def records(self) -> Records:
        """All rows, equal."""
        repeats = -(-self.max_length // len(DUMMY_TEXT.split())) + 1
        for number in range(1, self.num_rows + 1):
            yield Record({"text": DUMMY_TEXT * repeats}, number)


@dataclass(kw_only=True)
class HubSet:
    """A data set of the hub, fetched at first use."""

    source: Source
    _loaded: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Data set, configuration and split."""
        config = f"/{self.source.name}" if self.source.name else ""
        return f"{self.source.path}{config}[{self.source.split or 'train'}]"

    def digest(self) -> str | None:
        """The library's fingerprint of what was fetched; None when streaming."""
        fingerprint = getattr(self._load(), "_fingerprint", None)
        if self.source.num_rows is not None or fingerprint is None:
            return None
        return hashlib.sha256(f"{self.name} {fingerprint}".encode()).hexdigest()

    def records(self) -> Records:
        """Rows as the library gives them, numbered from 1."""
        yield from _records(self._load(), self.name)

    def stream(self, state: dict[str, Any] | None) -> HubStream:
        """The rows without fetching all first, from where `state` was taken; None: the first."""
        rows = self._open(streaming=True)
        if state is not None:
            rows.load_state_dict(state)
        return HubStream(rows=rows, name=self.name)

    def _load(self) -> Any:
        if self._loaded is None:
            self._loaded = self._open(streaming=self.source.num_rows is not None)
        return self._loaded

    def _open(self, *, streaming: bool) -> Any:
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                f"{self.source.path} is no file here, and hub data sets need the datasets "
                'package: pip install "nibble[data]"'
            ) from None
        try:
            return datasets.load_dataset(
                self.source.path,
                name=self.source.name,
                split=self.source.split or "train",
                streaming=streaming,
            )
        except Exception as error:  # the library and its transports raise dozens of types
            raise DataError(_unreachable(self.name, error)) from None


@dataclass(frozen=True, kw_only=True)
class HubStream:
    """A hub data set that is read as it arrives. `rows` is the library's iterable."""

    rows: Any
    name: str

    def records(self) -> Records:
        """The rows from here on, numbered from 1."""
        yield from _records(self.rows, self.name)

    def state(self) -> dict[str, Any]:
        """Where the next row is: numbers, words and None, as the library made them."""
        state: dict[str, Any] = self.rows.state_dict()
        return state


def _records(rows: Any, name: str) -> Records:
    remaining = iter(rows)
    number = 0
    while True:
        try:
            row = next(remaining)
        except StopIteration:
            return
        except Exception as error:  # a stream fails like a download: in any of many ways
            raise DataError(_unreachable(name, error)) from None
        number += 1
        yield Record(dict(row), number)


def _unreachable(name: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"{name} is neither a file here nor a hub data set that can be read ({reason}): check the "
        "name, split and network, or give a local file"
    )


def open_source(source: Source, *, max_length: int) -> list[SourceFile]:
    """The files of a source, in order: local files, one hub data set, or built-in rows.

    Raises DataError for what does not exist. Hub data sets are fetched later, when read.
    """
    if source.path.startswith(BUILTIN):
        if source.path != f"{BUILTIN}dummy":
            raise DataError(f"{source.path} is unknown: the built-in source is {BUILTIN}dummy")
        return [Dummy(num_rows=source.num_rows or DUMMY_ROWS, max_length=max_length)]
    local = local_files(source)
    return [HubSet(source=source)] if local is None else list(local)
