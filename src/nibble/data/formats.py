"""The shapes that training data comes in, read into four kinds of example.

    alpaca, prompt-completion   -> Completion      a prompt and its answer
    messages, sharegpt          -> Conversation    turns with roles
    text                        -> Document
    classification              -> Labelled        a text or a pair, and a class or a number

`choose` settles once per source which format it is and which column feeds which field, from the
columns of its first rows; `Reader.read` then turns rows into examples one by one. Nothing here
knows a tokenizer: whether a Completion becomes a chat or a plain text is decided in `encode.py`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nibble.data.report import EMPTY, MALFORMED, RowProblem
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Source

Message = dict[str, Any]

REQUIRED: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "classification": ("text", "label"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {"alpaca": ("input",), "classification": ("text_pair",)}
PROMPT_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
"""Columns that are taken as prompt and completion without being told."""
ANSWERS = ("completion", "answer", "output", "response")
"""Columns that are taken as the completion of a templated prompt, first found."""
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("text", "text_pair"),
)
SINGLE_TEXTS = ("text", "sentence")
ALIASES = {
    "question": "prompt",
    "query": "prompt",
    "answer": "completion",
    "output": "completion",
    "response": "completion",
}
"""Other names of the fields of prompt-completion."""
LABELS = ("label", "labels", "score", "Quality")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
}
"""ShareGPT's speakers as chat templates call them."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt and its answer; `plain_prompt` is what a model without a chat template is given, if
    it is something else."""

    prompt: str
    completion: str
    plain_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages with role and content, and whatever else the template reads."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """Plain text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A text or a pair of texts; the label as it stands in the file."""

    text: str
    text_pair: str | None
    label: str | int | float


Example = Completion | Conversation | Document | Labelled


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How rows of one source become examples. `fields`: field of the format -> column."""

    format: str
    fields: Mapping[str, str]
    template: str | None = None
    note: str = field(default="", compare=False)

    def read(self, values: Mapping[str, Any]) -> Example:
        """One example, or RowProblem if a field is missing, empty or not what it should be."""
        match self.format:
            case "alpaca" | "prompt-completion":
                return self._completion(values)
            case "messages" | "sharegpt":
                return Conversation(messages=self._messages(values))
            case "text":
                return Document(text=self._text(values, "text", full=True))
        pair = self._text(values, "text_pair") if "text_pair" in self.fields else None
        return Labelled(
            text=self._text(values, "text", full=True), text_pair=pair, label=self._label(values)
        )

    def _completion(self, values: Mapping[str, Any]) -> Completion:
        answer = "output" if self.format == "alpaca" else "completion"
        completion = self._text(values, answer, full=True)
        if self.template is not None:
            return Completion(prompt=fill(self.template, values), completion=completion)
        if self.format != "alpaca":
            return Completion(prompt=self._text(values, "prompt"), completion=completion)
        instruction = self._text(values, "instruction", full=True)
        given = self._text(values, "input", optional=True) if "input" in self.fields else ""
        prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
        return Completion(
            prompt=prompt, completion=completion, plain_prompt=alpaca_prompt(instruction, given)
        )

    def _text(
        self, values: Mapping[str, Any], name: str, *, full: bool = False, optional: bool = False
    ) -> str:
        column = self.fields[name]
        value = values.get(column)
        if value is None:
            if optional:
                return ""
            raise RowProblem(MALFORMED, f"{column} is missing")
        if not isinstance(value, str):
            raise RowProblem(MALFORMED, f"{column} is {type(value).__name__}, not text")
        if full and not value.strip():
            raise RowProblem(EMPTY, f"{column} is empty")
        return value

    def _label(self, values: Mapping[str, Any]) -> str | int | float:
        value = values.get(self.fields["label"])
        if value is None or value == "":
            raise RowProblem(MALFORMED, f"{self.fields['label']} is missing")
        if not isinstance(value, str | int | float):
            raise RowProblem(
                MALFORMED, f"{self.fields['label']} is {type(value).__name__}, not a label"
            )
        return int(value) if isinstance(value, bool) else value

    def _messages(self, values: Mapping[str, Any]) -> tuple[Message, ...]:
        column = self.fields[REQUIRED[self.format][0]]
        turns = values.get(column)
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise RowProblem(MALFORMED, f"{column} is not a list of messages")
        if not turns:
            raise RowProblem(EMPTY, f"{column} is empty")
        return tuple(_message(turn, f"{column}[{i}]") for i, turn in enumerate(turns))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowProblem(MALFORMED, f"{where} is not an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = str(message.pop("from"))
        if speaker not in ROLES:
            raise RowProblem(MALFORMED, f"{where}.from is {speaker!r}, not one of {_list(ROLES)}")
        message = {"role": ROLES[speaker], "content": message.pop("value", None), **message}
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        content = message["content"] = "".join(part["text"] for part in content)
    if not isinstance(message.get("role"), str):
        raise RowProblem(MALFORMED, f"{where} has no role")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise RowProblem(MALFORMED, f"{where} has no text as its content")
    return message


def alpaca_prompt(instruction: str, given: str) -> str:
    """The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), without and with
    input."""
    if not given.strip():
        return (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
    )


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with each {column} replaced; a missing value is a RowProblem."""
    out = []
    for literal, name, _, _ in string.Formatter().parse(template):
        out.append(literal)
        if name is not None:
            if values.get(name) is None:
                raise RowProblem(MALFORMED, f"{name} is missing")
            out.append(str(values[name]))
    return "".join(out)


def placeholders(template: str) -> list[str]:
    """The columns that a template names; ConfigError for braces that do not match."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"data template {template!r}: {error}; write {{column}} for a column and {{{{ }}}} "
            "for a brace"
        ) from None


def choose(source: Source, samples: Iterable[Mapping[str, Any]], *, task: str, name: str) -> Reader:
    """The reader of a source from the columns of its first rows.

    `task` is the model's: with "classification" `auto` looks for labels. DataError names the
    columns found and what the format wants.
    """
    columns = list(dict.fromkeys(column for sample in samples for column in sample))
    found = f"{name} has the columns {_list(columns)}"
    for target, column in source.columns.items():
        if column not in columns:
            raise DataError(f"{found}; data.columns asks for {column!r} as {target}")
    wanted = placeholders(source.template) if source.template is not None else []
    for column in wanted:
        if column not in columns:
            raise DataError(f"{found}; the template asks for {{{column}}}")
    form: str = source.format
    fields: dict[str, str] | None = None
    if form == "auto":
        for form in _candidates(source, task):
            fields = (
                _fields(form, source, columns) if _known(form).issuperset(source.columns) else None
            )
            if fields is not None:
                break
    else:
        fields = _fields(form, source, columns)
    if fields is None:
        raise DataError(f"{found}; {_wants(source, task)}")
    _check_task(form, task, name)
    known = _known(form)
    for target in source.columns:
        if target not in known:
            raise ConfigError(
                f"data source {name}: columns renames {target!r}, which format {form} does not "
                f"have; its fields are {_list(sorted(known))}"
            )
    if source.template is not None and form not in ("alpaca", "prompt-completion"):
        raise ConfigError(f"data source {name}: a template has no effect on format {form}")
    used = ", ".join(f"{k}={v}" if k != v else k for k, v in fields.items())
    detected = " (found)" if source.format == "auto" else ""
    return Reader(
        format=form,
        fields=fields,
        template=source.template,
        note=f"{name}: format {form}{detected}, from {used}",
    )


def _candidates(source: Source, task: str) -> tuple[str, ...]:
    if task == "classification":
        return ("classification",)
    if source.template is not None:
        return ("prompt-completion",)
    return ("messages", "sharegpt", "alpaca", "prompt-completion", "text")


def _known(form: str) -> set[str]:
    aliases = ALIASES if form == "prompt-completion" else {}
    return {*REQUIRED[form], *OPTIONAL.get(form, ()), *aliases}


def _fields(form: str, source: Source, columns: list[str]) -> dict[str, str] | None:
    """Which column feeds which field, or None if a field that must be there is not."""
    mapped = dict(source.columns)
    if form == "prompt-completion":
        mapped = {ALIASES.get(name, name): column for name, column in mapped.items()}
    fields = {
        name: name
        for name in (*REQUIRED[form], *OPTIONAL.get(form, ()))
        if name in columns and name not in mapped
    } | mapped
    if form == "prompt-completion":
        fields = _prompt_fields(fields, source, columns)
    elif form == "classification":
        fields = _label_fields(fields, columns)
    required = [
        name
        for name in REQUIRED[form]
        if source.template is None or name not in ("prompt", "instruction")
    ]
    return fields if all(name in fields for name in required) else None


def _prompt_fields(fields: dict[str, str], source: Source, columns: list[str]) -> dict[str, str]:
    if source.template is not None:
        answers = [column for column in ANSWERS if column in columns]
        return fields if "completion" in fields or not answers else {
            **fields, "completion": answers[0]
        }  # fmt: skip
    for prompt, completion in PROMPT_PAIRS:
        pair = {"prompt": prompt, "completion": completion} | fields
        if all(pair[name] in columns for name in ("prompt", "completion")):
            return pair
    return fields


def _label_fields(fields: dict[str, str], columns: list[str]) -> dict[str, str]:
    fields = dict(fields)
    for label in LABELS:
        if "label" not in fields and label in columns:
            fields["label"] = label
    if fields.get("text", "text") == "text":
        for first, second in TEXT_PAIRS:
            if "text_pair" not in fields and first in columns and second in columns:
                return {"text": first, "text_pair": second} | {
                    k: v for k, v in fields.items() if k == "label"
                }
    for single in SINGLE_TEXTS:
        if "text" not in fields and single in columns:
            fields["text"] = single
    return fields


def _check_task(form: str, task: str, name: str) -> None:
    if (form == "classification") != (task == "classification"):
        raise ConfigError(
            f"data source {name}: format {form} does not go with model.task {task}; "
            + ("use format classification" if task == "classification" else "set model.task")
        )


def _wants(source: Source, task: str) -> str:
    forms = [source.format] if source.format != "auto" else _candidates(source, task)
    wants = "; ".join(
        f"{form} wants {_list(REQUIRED[form])}"
        + (f" (and may have {_list(OPTIONAL[form])})" if form in OPTIONAL else "")
        for form in forms
    )
    return f"{wants}. Rename with columns: {{field: column}}, or give a template"


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
