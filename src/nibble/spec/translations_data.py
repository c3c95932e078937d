"""Words of other trainers about data: their data sets, templates and held-out rows.

axolotl lists sources with its own types, LLaMA-Factory and fsdp_qlora name registered sets, swift
appends the number of rows to a path. All become nibble's sources; what has no counterpart is
refused by name, never read in another way than its owner would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import datasets
from .texts import show
from .words import Claim, Layer, Refused, Translator

AXOLOTL_TYPES = {
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
    "chat_template": "messages",
    "completion": "text",
}
AXOLOTL_LOADERS = ("json", "csv", "parquet", "text")


def dataset(path: str) -> Translator:
    """A name of `datasets.py`, a path, `path#rows` (swift), or a list of these."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        items = value if isinstance(value, list) else str(value).split(",")
        found: list[Any] = []
        for item in items:
            name, _, rows = str(item).strip().partition("#")
            num_rows = int(rows) if rows.isdigit() else None
            if name in datasets.NAMED:
                found += datasets.sources(name, num_rows=num_rows)
            else:
                found.append({"path": name, "num_rows": num_rows} if num_rows else {"path": name})
        plain = len(found) == 1 and list(found[0]) == ["path"]
        yield Claim(path, found[0]["path"] if plain else found)

    return translate


def axolotl_datasets(path: str) -> Translator:
    """axolotl's list of {path, type, ...}."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        if not isinstance(value, list):
            raise Refused("give a list of {path, type}")
        yield Claim(path, [_axolotl_source(entry) for entry in value])

    return translate


def pretraining_dataset(value: Any, layer: Layer) -> Iterator[Claim]:
    """axolotl's text to stream: a path, or a list of {path, name, split, text_column}."""
    found = []
    for entry in value if isinstance(value, list) else [value]:
        source = {"path": entry} if isinstance(entry, str) else dict(entry)
        column = source.pop("text_column", "text")
        source.pop("type", None)
        if left := set(source) - {"path", "name", "split"}:
            raise Refused(f"{', '.join(sorted(left))} has no counterpart: path, name, split")
        columns = {} if column == "text" else {"columns": {"text": column}}
        found.append({**source, "format": "text", **columns})
    yield Claim("data.train", found)
    yield Claim("data.streaming", True)


def _axolotl_source(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "path" not in entry:
        raise Refused(f"{show(entry)} has no path")
    left = {key: value for key, value in entry.items() if value not in (None, False)}
    source: dict[str, Any] = {"path": left.pop("path")}
    files = left.pop("data_files", None)
    if files is not None:
        if source["path"] not in AXOLOTL_LOADERS or not isinstance(files, str):
            raise Refused(f"data_files {show(files)}: list each file as a source of its own")
        source["path"] = files
    left.pop("ds_type", None)  # nibble reads it off the file's name
    kind = left.pop("type", None)
    if isinstance(kind, Mapping):
        source |= _axolotl_fields(kind)
    elif kind is not None:
        if kind not in AXOLOTL_TYPES:
            allowed = ", ".join(AXOLOTL_TYPES)
            raise Refused(f"type {show(kind)} is not supported yet: one of {allowed}")
        source["format"] = AXOLOTL_TYPES[kind]
    mapping = left.pop("message_property_mappings", None)
    messages = left.pop("field_messages", None)
    if mapping is not None and mapping != {"role": "role", "content": "content"}:
        if mapping != {"role": "from", "content": "value"}:
            raise Refused(
                f"message_property_mappings {show(mapping)}: use format sharegpt or messages"
            )
        source["format"] = "sharegpt"
    if messages is not None:
        field = "conversations" if source.get("format") == "sharegpt" else "messages"
        source["columns"] = {field: messages}
    if source.get("format") == "text" and "field" in left:
        source["columns"] = {"text": left.pop("field")}
    for key in ("name", "split"):
        if key in left:
            source[key] = left.pop(key)
    left = {k: v for k, v in left.items() if (k, v) != ("roles_to_train", ["assistant"])}
    if left:
        raise Refused(f"{', '.join(left)} of {source['path']} is not supported yet: remove it")
    return source


def _axolotl_fields(kind: Mapping[str, Any]) -> dict[str, Any]:
    """axolotl's own prompt: field_instruction, field_input, field_output, format."""
    names = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
    wrong = [k for k, v in kind.items() if v not in (None, "") and k not in (*names, "format")]
    if wrong:
        raise Refused(f"type.{wrong[0]} is not supported yet: put it into the template")
    source: dict[str, Any] = {"format": "alpaca"}
    columns = {names[k]: v for k, v in kind.items() if k in names and v and v != names[k]}
    if columns:
        source["columns"] = columns
    if kind.get("format"):
        template = str(kind["format"])
        for field, column in columns.items():  # placeholders here are columns
            template = template.replace(f"{{{field}}}", f"{{{column}}}")
        source["template"] = template
    return source


def chat_template(value: Any, layer: Layer) -> Iterator[Claim]:
    """A Jinja file. Names of templates (axolotl) are refused: the tokenizer brings its own."""
    text = str(value)
    if text in ("tokenizer_default", "default"):
        return
    if text == "jinja" and layer.says("chat_template_jinja"):
        return
    if "." not in text and "/" not in text and "\\" not in text:
        raise Refused(
            f"{text} is a name, not a file: the tokenizer's own template is used when this is "
            "absent; or give a Jinja file"
        )
    yield Claim("data.chat_template", value)


def litgpt_data(value: Any, layer: Layer) -> Iterator[Claim]:
    """`--data JSON` (litgpt) goes with data.json_path; anything else is a source (mlx-lm)."""
    if value != "JSON":
        yield Claim("data.train", value)
    elif not layer.says("data.json_path"):
        raise Refused("JSON is a kind, not a file: give data.train, a .json or .jsonl file")


def held_out(value: Any, layer: Layer) -> Iterator[Claim]:
    """Rows held out of the training data; a fraction is refused, for nobody can see its size."""
    if isinstance(value, float) and 0 < value < 1:
        raise Refused(
            f"{value} is a share of a data set whose size the recipe does not know: "
            f"give data.eval_rows, such as {round(value * 10_000)} of 10,000 rows"
        )
    if value:
        yield Claim("data.eval_rows", int(value) if value == int(value) else value)
