"""A tiny model that can be talked to, data, and runs trained by the command line itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

MARKS = ("<user>", "<assistant>", "<system>")
WORDS = [*tiny.SPECIAL, *MARKS, *tiny.WORDS[len(tiny.SPECIAL) :]]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
POSITIONS = 64


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


Nibble = Callable[..., Done]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("COLUMNS", "200")
    yield
    patch.undo()


@pytest.fixture
def nibble(capfd: pytest.CaptureFixture[str]) -> Nibble:
    """Run a command in this process; what it wrote to the file descriptors comes back."""

    def call(*words: str) -> Done:
        from nibble.cli import main

        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Done(code=code, out=out, err=err)

    return call


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> None:
    tiny.save_tokenizer(folder, WORDS, marks=MARKS, template=template)


def save_model(folder: Path, *, template: str | None = TEMPLATE, **more: Any) -> Path:
    tiny.save_llama(folder, len(WORDS), max_position_embeddings=POSITIONS, **more)
    save_tokenizer(folder, template=template)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, base: Path, rows: Path, out: Path, **sections: Any) -> Path:
    """JSON is YAML."""
    words: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": [{"path": str(rows)}], "eval_rows": 8, "max_length": 32},
        "optim": {"learning_rate": 2e-2},
        "train": {"precision": "fp32", "micro_batch_size": 4, "max_steps": 3,
                  "activation_checkpointing": "none"},
        "place": {"device": "cpu"},
        "report": {"sinks": ["plain"]},
        "output_dir": str(out),
    }  # fmt: skip
    for name, section in sections.items():
        words[name] = {**words.get(name, {}), **section}
    path.write_text(json.dumps(words))
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/, plain/ (no chat template), rows.jsonl, labelled.jsonl, text.txt and
    recipe.yaml, which trains run/."""
    root = tmp_path_factory.mktemp("world")
    base = save_model(root / "base")
    save_model(root / "plain", template=None)
    rows = [
        {"prompt": f"the a of w{i % 40} is", "completion": f"w{(i * 7 + 1) % 40} b"}
        for i in range(48)
    ]
    write_rows(root / "rows.jsonl", rows)
    names = ("no", "perhaps", "yes")
    labelled = [{"text": f"the {'abc'[i % 3]} w{i % 40}", "label": names[i % 3]} for i in range(60)]
    write_rows(root / "labelled.jsonl", labelled)
    (root / "text.txt").write_text(" ".join(f"the a of w{i % 40} is" for i in range(60)))
    write_recipe(
        root / "recipe.yaml", base, root / "rows.jsonl", root / "run",
        adapter={"kind": "lora", "rank": 4}, quant={"format": "nf4"},
    )  # fmt: skip
    return root


@pytest.fixture(scope="session")
def run(world: Path) -> Path:
    """A finished QLoRA run."""
    from nibble.cli import main

    assert main(["train", str(world / "recipe.yaml")]) == 0
    return world / "run"


@pytest.fixture(scope="session")
def classifier(world: Path) -> Path:
    """A finished run of a classifier with a LoRA adapter."""
    from transformers import BertConfig, BertModel

    from nibble.cli import main

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(world / "bert")
    save_tokenizer(world / "bert", template=None)
    recipe = write_recipe(
        world / "classify.yaml", world / "bert", world / "labelled.jsonl", world / "classifier",
        model={"task": "classification"}, data={"max_length": 16, "eval_rows": 12},
        adapter={"kind": "lora", "rank": 4}, train={"max_steps": 80},
        optim={"learning_rate": 1e-2},
    )  # fmt: skip
    assert main(["train", str(recipe)]) == 0
    return world / "classifier"
