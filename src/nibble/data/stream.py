"""Rows without end from a stream of texts: for pretraining, where data are not tokenised first.

    texts -> tokens, each text with the tokenizer's own begin and end
          -> one long line of tokens, cut every max_length: no padding, nothing lost at a seam
          -> blocks of BLOCK_ROWS rows, each in a random order of its own (seed, epoch, block)
          -> steps of micro_batch_size x accumulation x world rows

A row may hold the end of one text and the beginning of the next, and attention sees both, as is
usual in pretraining. Every process reads and tokenises the whole stream and takes its rows of each
step, so the rows of a step do not depend on how many processes there are, and a run goes on with
another number of them; a process costs some cores of tokenising, in a thread that works one block
ahead.

A position is (epoch, block, row) and where the block begins: a chunk of documents, a document of
it, a token of that. So a resumed run reads on from there and tokenises one block again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nibble.data.documents import START, Chunk, Documents
from nibble.data.order import permutation
from nibble.data.pack import IGNORE, Batch
from nibble.data.report import DataReport, Tally, summarise
from nibble.data.rows import Rows
from nibble.errors import CheckpointError, ConfigError, DataError
from nibble.spec.config import Data, Source

BLOCK_ROWS = 2048
"""Rows that are shuffled together."""
DEFAULT_EVAL_TOKENS = 1_000_000
_STREAM = 0x57E4
"""Keeps the order of blocks apart from that of tokenised rows."""

Ids = NDArray[np.int32]
Place = dict[str, Any]
"""{"chunk": position, "document": of the chunk, "token": of the document}: the next token."""
BEGINNING: Place = {"chunk": START, "document": 0, "token": 0}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextStream:
    """What is streamed: the sources, how texts become tokens, and the first token to train on."""

    sources: tuple[Source, ...]
    tokenizer: Any
    max_length: int
    begin: Place = field(default_factory=lambda: dict(BEGINNING))

    def tokens(self, texts: list[str]) -> list[Ids]:
        """The tokens of each text, its end included.

        Raises ConfigError for a tokenizer that has no end.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                "the tokenizer has no end token (eos_token), so texts could not be told apart: set "
                "it in the tokenizer's files"
            )
        if not texts:
            return []
        made = self.tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return [np.asarray(i if i and i[-1] == end else [*i, end], dtype=np.int32) for i in made]


class TokenReader:
    """Rows of a stream one after the other from a place on, and the place behind them."""

    def __init__(self, stream: TextStream, place: Place) -> None:
        self._stream = stream
        self.tally = Tally()
        documents = Documents(
            sources=stream.sources, max_length=stream.max_length, tally=self.tally
        )
        self._chunks = documents.chunks(place["chunk"])
        self._left: deque[tuple[Chunk, int, Ids]] = deque()
        self._skip: Place | None = place
        self.place = place
        """Where the next token is."""

    def take(self, num_rows: int) -> Ids:
        """Up to `num_rows` rows [rows, max_length]; fewer at the end of the stream."""
        length = self._stream.max_length
        wanted = num_rows * length
        have = sum(len(ids) for _, _, ids in self._left) - self._used()
        while have < wanted and (more := self._read()) is not None:
            have += more
        size = min(wanted, have // length * length)
        parts: list[Ids] = []
        while size > 0:
            chunk, document, ids = self._left[0]
            start = self.place["token"]
            part = ids[start : start + size]
            parts.append(part)
            size -= len(part)
            if start + len(part) == len(ids):
                self._left.popleft()
                self._advance(chunk, document)
            else:
                self.place = {**self.place, "token": start + len(part)}
        flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return flat.reshape(-1, length)

    def _used(self) -> int:
        return int(self.place["token"]) if self._left else 0

    def _advance(self, chunk: Chunk, document: int) -> None:
        """Go to the document after one that is used up."""
        if self._left:
            after, number, _ = self._left[0]
            self.place = {"chunk": after.at, "document": number, "token": 0}
        else:
            self.place = {"chunk": chunk.at, "document": document + 1, "token": 0}

    def _read(self) -> int | None:
        """Tokenise one more chunk; the tokens that it adds, None at the end."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return None
        made = [(chunk, i, ids) for i, ids in enumerate(self._stream.tokens(chunk.texts))]
        skip, self._skip = self._skip, None
        if skip is not None:
            made = made[skip["document"] :]
        if not self._left and made:
            token = skip["token"] if skip is not None else 0
            self.place = {"chunk": chunk.at, "document": made[0][1], "token": token}
            self._left.extend(made)
            return sum(len(ids) for _, _, ids in made) - token
        self._left.extend(made)
        return sum(len(ids) for _, _, ids in made)


class StreamLoader:
    """Steps without end from a stream: each is the list of this process's micro-batches."""

    def __init__(
        self,
        stream: TextStream,
        *,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        assert 0 <= rank < world and micro_batch_size > 0 and accumulation > 0
        self._stream, self._seed, self._shuffle = stream, seed, shuffle
        self._micro_batch_size, self._accumulation = micro_batch_size, accumulation
        self._rank, self._world = rank, world
        self.rows_per_step = micro_batch_size * accumulation * world
        self._rows: Ids | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")
        self._ahead: Future[tuple[Ids, Place]]
        self._go_to(epoch=0, block=0, row=0, place=stream.begin)

    def steps_of_tokens(self, num_tokens: int) -> int:
        """Steps that train on at least so many tokens."""
        return -(-num_tokens // (self.rows_per_step * self._stream.max_length))

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """This process's micro-batches of the next step; the state then names the one after."""
        rows = self._take(self.rows_per_step)
        size = self._micro_batch_size
        starts = [(m * self._world + self._rank) * size for m in range(self._accumulation)]
        return [row_batch(rows[start : start + size]) for start in starts]

    def _take(self, num_rows: int) -> Ids:
        parts = []
        while num_rows > 0:
            if self._rows is None:
                self._rows = self._next_block()
            part = self._rows[self._row : self._row + num_rows]
            parts.append(part)
            num_rows -= len(part)
            self._row += len(part)
            if self._row == len(self._rows):
                self._end_block()
        return np.concatenate(parts)

    def _end_block(self) -> None:
        """Go on to the next block, or to the first of the next epoch."""
        self._rows, self._row = None, 0
        self._block += 1
        self._place = self._after

    def _next_block(self) -> Ids:
        """The rows of the block that begins at the present place, in their order."""
        rows, after = self._ahead.result()
        if not len(rows):  # the stream has ended
            if self._block == 0:
                raise DataError(
                    f"the data hold fewer than data.max_length={self._stream.max_length} tokens: "
                    "there is no row to train on"
                )
            self._go_to(epoch=self._epoch + 1, block=0, row=0, place=self._stream.begin)
            return self._next_block()
        self._after = after
        self._ahead = self._worker.submit(self._read)
        if self._shuffle:
            rows = rows[permutation(len(rows), self._seed, self._epoch, self._block, _STREAM)]
        return rows

    def _read(self) -> tuple[Ids, Place]:
        rows = self._reader.take(BLOCK_ROWS)
        return rows, self._reader.place

    def _go_to(self, *, epoch: int, block: int, row: int, place: Place) -> None:
        self._epoch, self._block, self._row, self._place = epoch, block, row, place
        self._after = place
        self._rows = None
        self._reader = TokenReader(self._stream, place)
        self._ahead = self._worker.submit(self._read)

    def state_dict(self) -> dict[str, Any]:
        """Where the next step is, and what this position counts in."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "row": self._row,
            "place": self._place,
            "seed": self._seed,
            "max_length": self._stream.max_length,
            "rows_per_step": self.rows_per_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; CheckpointError if sizes differ."""
        mine = self.state_dict()
        for name in ("seed", "max_length", "rows_per_step"):
            if state.get(name) != mine[name]:
                raise CheckpointError(
                    f"the checkpoint was made with {name} {state.get(name)} and this run has "
                    f"{mine[name]}: go on with the data, seed and batch size it was made with"
                )
        self._ahead.cancel()
        self._go_to(**{name: state[name] for name in ("epoch", "block", "row", "place")})


def row_batch(rows: Ids) -> Batch:
    """Rows [n, length] of one line of tokens as a batch: every token but the first is learnt."""
    ids = torch.from_numpy(rows.astype(np.int64))
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=None,
        attention_mask=None,
        num_targets=labels[:, :-1].numel(),
        num_tokens=ids.numel(),
        doc_lengths=((ids.shape[1],),) * len(ids),
    )


def open_stream(
    data: Data, tokenizer: Any
) -> tuple[TextStream, Rows | None, DataReport, DataReport | None]:
    """The stream of a recipe, its held-out rows, and what was found; held out is tokenised now.

    Without data.eval, `data.eval_tokens` are taken from the beginning of the stream, which is then
    never trained on. Raises DataError for sources that cannot be read.
    """
    stream = TextStream(sources=data.train, tokenizer=tokenizer, max_length=data.max_length)
    num_tokens = data.eval_tokens or (DEFAULT_EVAL_TOKENS if data.eval else 0)
    held_out, counted = None, None
    if num_tokens:
        source = stream
        if data.eval:
            source = TextStream(sources=data.eval, tokenizer=tokenizer, max_length=data.max_length)
        reader = TokenReader(source, source.begin)
        rows = reader.take(max(1, num_tokens // data.max_length))
        if not len(rows):
            raise DataError(f"the held-out data hold fewer than {data.max_length} tokens: no row")
        held_out = _stored(rows)
        counted = summarise(
            [(reader.tally, (source.sources[0].path,))],
            num_rows=len(rows),
            num_tokens=rows.size,
            num_target_tokens=rows.size - len(rows),
        )
        if not data.eval:
            stream = TextStream(
                sources=data.train,
                tokenizer=tokenizer,
                max_length=data.max_length,
                begin=reader.place,
            )
    names = ", ".join(source.path for source in data.train)
    said = f"{names}: read while training, in rows of {data.max_length} tokens"
    return stream, held_out, DataReport(notes=(said,)), counted


def _stored(rows: Ids) -> Rows:
    num_rows, length = rows.shape
    targets = torch.ones(num_rows, length, dtype=torch.bool)
    targets[:, 0] = False
    return Rows(
        ids=torch.from_numpy(rows.reshape(-1).copy()),
        targets=targets.reshape(-1),
        offsets=torch.arange(num_rows + 1) * length,
        files=("the stream",),
        file_of=torch.zeros(num_rows, dtype=torch.int32),
        line_of=torch.arange(1, num_rows + 1),
    )


def no_rows() -> Rows:
    """What is there of a split that is streamed."""
    return Rows(
        ids=torch.empty(0, dtype=torch.int32),
        targets=torch.empty(0, dtype=torch.bool),
        offsets=torch.zeros(1, dtype=torch.int64),
        files=(),
        file_of=torch.empty(0, dtype=torch.int32),
        line_of=torch.empty(0, dtype=torch.int64),
    )
