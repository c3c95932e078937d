"""Write the parts of docs/ that are made from the code, and say which are stale.

    python dev/pages.py            rewrite them
    python dev/pages.py --check    fail if that would change anything

A page holds `<!-- generated: NAME -->` ... `<!-- end -->`; what stands between is made by the
function of that name below. Hand-kept tables go out of date; these cannot, because a test compares
them. No torch: everything here is words.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nibble import errors
from nibble.spec import datasets, recipes, schema
from nibble.spec.aliases import ALIASES
from nibble.spec.fsdp_qlora import TRAIN_TYPES
from nibble.spec.load import load_recipe
from nibble.spec.refusals import REFUSED

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

NAMES = {"axolotl": "axolotl", "llama-factory": "LLaMA-Factory", "trl": "TRL and transformers"}
CROSSWALK: dict[str, tuple[str, ...]] = {
    "axolotl": (
        "base_model: my-model",
        "adapter: qlora",
        "{adapter: lora, load_in_8bit: true}",
        "{adapter: lora, peft_use_dora: true}",
        "{adapter: lora, lora_r: 16, lora_alpha: 32, lora_dropout: 0.05}",
        "{adapter: lora, lora_target_linear: true}",
        "{adapter: lora, lora_target_modules: [q_proj, v_proj]}",
        "datasets: [{path: my-data.jsonl, type: alpaca}]",
        "{datasets: [{path: my-data.jsonl}], val_set_size: 200}",
        "sequence_len: 2048",
        "sample_packing: true",
        "train_on_inputs: false",
        "micro_batch_size: 2",
        "num_epochs: 3",
        "optimizer: adamw_bnb_8bit",
        "{lr_scheduler: cosine, cosine_min_lr_ratio: 0.1}",
        "bf16: auto",
        "gradient_checkpointing: true",
        "gpu_memory_limit: 20",
        "wandb_project: mine",
    ),
    "llama-factory": (
        "model_name_or_path: my-model",
        "finetuning_type: full",
        "{finetuning_type: lora, quantization_bit: 4}",
        "{finetuning_type: lora, quantization_bit: 8}",
        "{finetuning_type: lora, quantization_bit: 3, quantization_method: hqq}",
        "{finetuning_type: lora, lora_rank: 8, lora_target: all}",
        "{finetuning_type: lora, use_rslora: true}",
        "{finetuning_type: lora, additional_target: lm_head}",
        "{stage: sft, do_train: true}",
        "cutoff_len: 2048",
        "neat_packing: true",
        "train_on_prompt: false",
        "{dataset: my-data.jsonl, max_samples: 1000}",
        "{dataset: my-data.jsonl, val_size: 200}",
        "per_device_train_batch_size: 2",
        "num_train_epochs: 3",
        "disable_gradient_checkpointing: true",
    ),
    "trl": (
        "{use_peft: true, load_in_4bit: true}",
        "{use_peft: true, lora_r: 8, lora_target_modules: all-linear}",
        "{use_peft: true, load_in_4bit: true, use_bnb_nested_quant: true}",
        "dataset_name: my-data.jsonl",
        "max_length: 1024",
        "packing: true",
        "completion_only_loss: true",
        "assistant_only_loss: true",
        "optim: adamw_8bit",
        "lr_scheduler_type: constant_with_warmup",
        "warmup_steps: 0.1",
        "{adam_beta2: 0.95, adam_epsilon: 1.0e-6}",
        "torch_dtype: bfloat16",
        "logging_steps: 10",
        "save_steps: 500",
        "save_total_limit: 3",
        "report_to: [wandb, tensorboard]",
    ),
}


def fields() -> str:
    """Every setting of a recipe, by section."""
    lines: list[str] = []
    rows = recipes.fields()
    for name, model in schema.sections().items():
        lines += [f"## {name}", "", (model.__doc__ or "").strip(), ""]
        lines += _field_table(row for row in rows if row.path.startswith(f"{name}."))
    lines += ["## The run folder", ""]
    lines += _field_table(row for row in rows if "." not in row.path and "[]" not in row.path)
    return "\n".join(lines)


def _field_table(rows: Iterator[recipes.FieldRow]) -> list[str]:
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.path}`", row.type_text, _default(row.default), row.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _default(value: object) -> str:
    if value == schema.REQUIRED:
        return "required"
    if value is None:
        return "null"
    if value in ((), {}):
        return "empty"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def built_in() -> str:
    """The built-in recipes."""
    rows = [f"| `{name}` | {recipes.summary(name)} |" for name in recipes.names()]
    return "\n".join(["| recipe | what it is for |", "|---|---|", *rows, ""])


def crosswalk(trainer: str) -> Callable[[], str]:
    """What a trainer's words become: read by the same function that reads recipes."""

    def make() -> str:
        lines = [f"| {NAMES[trainer]} | nibble |", "|---|---|"]
        for text in CROSSWALK[trainer]:
            words = yaml.safe_load(text)
            shown = text.strip("{}") if text.startswith("{") else text
            lines.append(f"| `{shown}` | {_becomes(words)} |")
        return "\n".join([*lines, ""])

    return make


def _becomes(words: dict[str, Any]) -> str:
    named = bool({"base_model", "model_name_or_path"} & set(words))
    recipe = load_recipe(None, base=words if named else {"model.path": "-", **words})
    found = dict(_flat(recipe.model_dump(mode="json", exclude_unset=True)))
    if not named:
        found.pop("model.path")
    if not found:
        return "what nibble does anyway"
    return "<br>".join(f"`{path}: {_yaml(value)}`" for path, value in found.items())


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("...").strip()


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def aliases() -> str:
    """Every other name of a setting, by setting, and the words that are read by their value."""
    by_path: dict[str, list[str]] = {}
    for word, meaning in ALIASES.items():
        if isinstance(meaning, str):
            by_path.setdefault(meaning, []).append(word)
    lines = ["| setting | other names |", "|---|---|"]
    for path in sorted(by_path):
        lines.append(f"| `{path}` | {', '.join(f'`{word}`' for word in by_path[path])} |")
    by_value = [f"`{word}`" for word, meaning in ALIASES.items() if not isinstance(meaning, str)]
    return "\n".join(
        [*lines, "", f"Read by their value, as in the tables above: {', '.join(by_value)}.", ""]
    )


def refused() -> str:
    """Words that are known and not accepted."""
    by_reason: dict[str, list[str]] = {}
    for pattern, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(pattern)
    lines = ["| words | what nibble says |", "|---|---|"]
    for reason, patterns in by_reason.items():
        words = ", ".join(f"`{pattern}`" for pattern in patterns)
        lines.append(f"| {words} | {reason.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def train_types() -> str:
    """fsdp_qlora's train types as two settings."""
    rows = [
        f"| `{name}` | `quant.format: {kind.format}`, `adapter.kind: {kind.adapter}` |"
        for name, kind in TRAIN_TYPES.items()
    ]
    return "\n".join(["| `--train_type` | recipe |", "|---|---|", *rows, ""])


def named_sets() -> str:
    """Data sets that have a name."""
    lines = ["| name | source | format |", "|---|---|---|"]
    for name, named in datasets.NAMED.items():
        source = named.source
        lines.append(f"| `{name}` | `{source['path']}` | {source.get('format', 'text')} |")
    return "\n".join([*lines, ""])


def error_tree() -> str:
    """The classes of errors.py with their exit codes."""
    lines = ["| error | exit code | meaning |", "|---|---|---|"]
    for kind in (errors.NibbleError, *errors.NibbleError.__subclasses__()):
        doc = " ".join((kind.__doc__ or "").split())
        lines.append(f"| `{kind.__name__}` | {kind.exit_code} | {doc} |")
    return "\n".join([*lines, ""])


GENERATORS: dict[str, Callable[[], str]] = {
    "fields": fields,
    "built-in": built_in,
    **{f"crosswalk-{name}": crosswalk(name) for name in CROSSWALK},
    "aliases": aliases,
    "refused": refused,
    "train-types": train_types,
    "named-sets": named_sets,
    "errors": error_tree,
}


def generate(text: str) -> str:
    """A page with its generated parts made anew."""

    def fill(found: re.Match[str]) -> str:
        return found[1] + GENERATORS[found[2]]() + found[3]

    return BLOCK.sub(fill, text)


def stale(*, write: bool) -> list[str]:
    """Names of the pages whose generated parts differ from the code; `write` makes them new."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        made = generate(text)
        if made != text:
            found.append(page.name)
            if write:
                page.write_text(made, encoding="utf-8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the generated parts of docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if stale")
    words = parser.parse_args()
    found = stale(write=not words.check)
    for name in found:
        print(f"docs/{name} {'is stale' if words.check else 'written'}")
    return int(words.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
