"""From the recipe's data section to rows that are ready to be batched.

Reads every source of both splits, holds out rows where the recipe says so, gives labels their ids,
and adds up what became of all rows. The held-out rows are chosen by seed among the rows that can be
learnt, so they are the same whatever else fell out; of a document that was cut to be packed, some
pieces may be held out and others learnt. Refuses a run in which nothing would be trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nibble.data import cache
from nibble.data.chat import chat_template
from nibble.data.encode import Encoder, plain_prompt
from nibble.data.formats import Completion, Conversation, Example, Message, alpaca_prompt
from nibble.data.hub import open_source
from nibble.data.labels import label_names, label_tensor
from nibble.data.order import permutation
from nibble.data.report import DataReport, Tally, first_problem, summarise
from nibble.data.rows import Rows, join
from nibble.data.sources import SourceFile
from nibble.data.stream import TextStream, no_rows, open_stream
from nibble.data.tokenise import Progress, Tokenised, read_examples, tokenise_source
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Data, Source

HOLD_OUT = 0x401D
"""Keeps the choice of held-out rows apart from the order of epochs."""


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """A held-out row as text: `prompt` is what the model is given (with the chat template applied,
    when `special_tokens` is False), `reference` the answer; `messages` what made the prompt."""

    source: str
    prompt: str
    reference: str
    special_tokens: bool
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalRecords:
    """The held-out rows as text, read again from their files when asked for."""

    sources: tuple[Source, ...]
    encoder: Encoder
    task: str
    wanted: frozenset[str]

    def __iter__(self) -> Iterator[EvalRecord]:
        """In the order of the files; plain documents have no question and are left out."""
        for source in self.sources:
            files = open_source(source, max_length=self.encoder.data.max_length)
            for file, line, example in read_examples(source, files, task=self.task, tally=Tally()):
                place = f"{files[file].name}:{line}"
                if place in self.wanted:
                    record = self._record(example, place)
                    if record is not None:
                        yield record

    def _record(self, example: Example, place: str) -> EvalRecord | None:
        if isinstance(example, Completion | Conversation) and self.encoder.template is not None:
            messages = self.encoder.messages(example)
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            return EvalRecord(
                source=place,
                prompt=self.encoder.chat.render(messages[:last], prompt=True),
                reference=str(messages[last].get("content", "")),
                special_tokens=False,
                messages=tuple(messages[:last]),
            )
        if isinstance(example, Completion):
            return EvalRecord(
                source=place,
                prompt=plain_prompt(example),
                reference=example.completion,
                special_tokens=True,
            )
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """What is learnt and what is held out, with what became of every row.

    `label_names` (empty for regression) belong to classification. `stop_ids`: the tokens that end
    answers, for generation. `question_prompt`: how a question was put where there is no chat
    template, with {question} in it; None where it is the prompt itself. With a `stream` there are
    no rows in `train`: they are made while training.
    """

    train: Rows
    eval: Rows | None
    report: DataReport
    eval_report: DataReport | None = None
    eval_records: EvalRecords | None = field(default=None, repr=False)
    label_names: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    question_prompt: str | None = None
    stream: TextStream | None = None

    @property
    def num_labels(self) -> int:
        """Outputs of a classification head: the classes, or 1 for regression."""
        return len(self.label_names) or 1


def prepare(
    data: Data,
    tokenizer: Any,
    *,
    task: str,
    seed: int,
    can_pack: bool,
    num_labels: int | None = None,
    progress: Progress | None = None,
) -> Splits:
    """Rows of both splits from the recipe's data section.

    `task`: causal-lm or classification. `can_pack`: whether the model's family keeps documents of
    one row apart. `num_labels`: what the recipe fixes (1: regression). ConfigError for words that
    contradict each other, DataError for sources that cannot be read or would train nothing.
    """
    if data.streaming:
        return _streamed(data, tokenizer)
    encoder = _encoder(data, tokenizer, task=task, can_pack=can_pack)
    digest = cache.tokenizer_digest(tokenizer)
    train = [_source(one, encoder, task, digest, progress) for one in data.train]
    held = [_source(one, encoder, task, digest, progress) for one in data.eval]
    names: tuple[str, ...] = ()
    if task == "classification":
        names = _names([label for one in [*train, *held] for label in one.raw_labels], num_labels)
        train, held = ([_with_labels(one, names) for one in part] for part in (train, held))
    rows = _joined(train, "data.train")
    report = _report(train, rows)
    eval_rows, eval_report, sources = None, None, data.eval
    if held:
        eval_rows = _joined(held, "data.eval")
        eval_report = _report(held, eval_rows)
    elif data.eval_rows is not None:
        rows, eval_rows = _hold_out(rows, data.eval_rows, seed=seed)
        report, eval_report = _counted(report, rows), _counted(DataReport(), eval_rows)
        eval_report = replace(eval_report, num_read=len(eval_rows))
        sources = data.train
    records = None
    if eval_rows is not None and task == "causal-lm":
        wanted = frozenset(eval_rows.source(i) for i in range(len(eval_rows)))
        records = EvalRecords(sources=sources, encoder=encoder, task=task, wanted=wanted)
    return Splits(
        train=rows,
        eval=eval_rows,
        report=report,
        eval_report=eval_report,
        eval_records=records,
        label_names=names,
        stop_ids=tuple(sorted({stop for one in [*train, *held] for stop in one.stop_ids})),
        question_prompt=_question_prompt(data.train[0], encoder, task=task),
    )


def _streamed(data: Data, tokenizer: Any) -> Splits:
    stream, eval_rows, report, eval_report = open_stream(data, tokenizer)
    return Splits(
        train=no_rows(), eval=eval_rows, report=report, eval_report=eval_report, stream=stream
    )


def _question_prompt(source: Source, encoder: Encoder, *, task: str) -> str | None:
    """Alpaca's words around a question, if that is what the model learns to answer."""
    if task != "causal-lm" or encoder.template is not None:
        return None
    files = open_source(source, max_length=encoder.data.max_length)
    first = next(read_examples(source, files, task=task, tally=Tally()), None)
    if first is None or not isinstance(first[2], Completion) or first[2].plain_prompt is None:
        return None
    return alpaca_prompt("{question}", "")


def _encoder(data: Data, tokenizer: Any, *, task: str, can_pack: bool) -> Encoder:
    if not data.train:
        raise ConfigError("data.train is empty: name at least one source to learn from")
    if data.eval and data.eval_rows is not None:
        raise ConfigError("data.eval and data.eval_rows are both given: keep one of them")
    if data.packing and task == "classification":
        raise ConfigError("data.packing has no effect on classification: set it to false")
    if data.packing and not can_pack:
        raise ConfigError(
            "data.packing: this model's family cannot keep the documents of a row apart; set it "
            "to false"
        )
    template = None
    if task == "causal-lm":
        template = chat_template(tokenizer, override=data.chat_template)
        if data.system is not None and template is None:
            raise ConfigError(
                "data.system needs a chat template, and the tokenizer has none: set "
                "data.chat_template or write it into data.train[].template"
            )
    return Encoder(tokenizer=tokenizer, data=data, template=template)


def _source(
    source: Source, encoder: Encoder, task: str, digest: str, progress: Progress | None
) -> Tokenised:
    data = encoder.data
    files: Sequence[SourceFile] = open_source(source, max_length=data.max_length)
    key = cache.cache_key(
        source, files, data, task=task, tokenizer_hash=digest, template=encoder.template
    )
    folder = cache.cache_folder(data.cache_dir)
    found = None if key is None else cache.load(folder, key, files=files)
    if found is not None:
        if progress is not None:
            progress(f"tokenise {source.path}", found.tally.num_read, found.tally.num_read)
        return found
    made = tokenise_source(source, files, encoder=encoder, task=task, progress=progress)
    problem = None if key is None else cache.save(folder, key, made)
    if problem is not None:
        made.tally.note(f"{source.path}: the tokenised rows could not be kept ({problem})")
    return made


def _names(raw: list[Any], num_labels: int | None) -> tuple[str, ...]:
    names = label_names(raw) if raw else ()
    if num_labels is None:
        return names
    if num_labels == 1:
        label_tensor(raw, ())
        return ()
    if not names:
        raise DataError(f"the labels are numbers with a point, not {num_labels} classes")
    if all(name.isdigit() and int(name) < num_labels for name in names):
        return tuple(map(str, range(num_labels)))
    if len(names) > num_labels:
        raise DataError(f"the data have {len(names)} classes, model.num_labels is {num_labels}")
    return names


def _with_labels(tokenised: Tokenised, names: tuple[str, ...]) -> Tokenised:
    labels = label_tensor(tokenised.raw_labels, names)
    return replace(tokenised, rows=replace(tokenised.rows, labels=labels, label_names=names))


def _joined(parts: list[Tokenised], what: str) -> Rows:
    rows = join([part.rows for part in parts])
    if not len(rows):
        tallies = [(part.tally, part.rows.files) for part in parts]
        counts = summarise(tallies, num_rows=0, num_tokens=0, num_target_tokens=0).counts
        why = ", ".join(f"{count} {fate}" for fate, count in counts.items())
        raise DataError(
            f"nothing in {what} can be trained on ({why}); the first: {first_problem(tallies)}"
        )
    return rows


def _report(parts: list[Tokenised], rows: Rows) -> DataReport:
    report = summarise(
        [(part.tally, part.rows.files) for part in parts],
        num_rows=0, num_tokens=0, num_target_tokens=0,
    )  # fmt: skip
    return _counted(report, rows)


def _counted(report: DataReport, rows: Rows) -> DataReport:
    return replace(
        report,
        num_rows=len(rows),
        num_tokens=rows.num_tokens,
        num_target_tokens=rows.num_targets,
        longest=max(report.longest, int(rows.lengths.max())),
    )


def _hold_out(rows: Rows, num_rows: int, *, seed: int) -> tuple[Rows, Rows]:
    if num_rows >= len(rows):
        raise DataError(
            f"data.eval_rows holds out {num_rows} rows of {len(rows)}: nothing would be left to "
            "train on"
        )
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[torch.from_numpy(permutation(len(rows), seed, HOLD_OUT)[:num_rows])] = True
    return rows.select((~held).nonzero().flatten()), rows.select(held.nonzero().flatten())
