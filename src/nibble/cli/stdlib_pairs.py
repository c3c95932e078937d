"""Instruction pairs from documentation that every Python carries: its own.

A pair asks what a public function, class or method of the standard library does; the answer is its
signature and the first paragraph of its docstring. The text is real, licensed with Python, differs
a little between versions, and needs no download. Pairs are shuffled by a fixed seed; the held-out
ones are of functions that the training set does not contain.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = tuple(
    """
    argparse ast base64 bisect calendar cmath collections colorsys contextlib copy csv datetime
    decimal difflib dis email.utils fileinput fnmatch fractions functools getpass gettext glob
    gzip hashlib heapq hmac html inspect io ipaddress itertools json keyword linecache locale
    logging lzma math mimetypes operator os os.path pathlib pickle pkgutil platform pprint queue
    quopri random re reprlib sched secrets select selectors shelve shlex shutil signal socket
    sqlite3 ssl stat statistics string struct subprocess sys tarfile tempfile textwrap threading
    time timeit tokenize traceback types typing unicodedata unittest.mock urllib.parse uuid
    warnings weakref zipfile zlib
    """.split()  # noqa: SIM905
)
MIN_CHARACTERS, MAX_CHARACTERS = 30, 320
HELD_OUT_QUESTION = "shutil.which"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question and its answer, about one documented name."""

    name: str
    question: str
    answer: str


def first_paragraph(text: str) -> str:
    """The first paragraph of a docstring that is prose, on one line."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        line = " ".join(paragraph.split())
        # Builtins repeat their signature ("dirname(p) -> ...") before the prose.
        line = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], .]+?)?\s*(--|:|\n|$)\s*", "", line)
        if re.match(r"^[A-Z][^>]*[a-z]", line) and ">>>" not in line:
            return line
    return ""


def signature(thing: Any) -> str:
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(thing)))
    except (ValueError, TypeError):
        return "(...)"


def public_members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of what the module itself defines, methods of its classes included."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in sorted(names):
        thing = getattr(module, name, None)
        if not callable(thing):
            continue
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            for method_name, method in sorted(vars(thing).items()):
                if not method_name.startswith("_") and inspect.isroutine(method):
                    yield f"{module.__name__}.{name}.{method_name}", getattr(thing, method_name)


def make_pairs(*, seed: int = 0) -> list[Pair]:
    """All pairs that this Python's library yields, in an order fixed by the seed."""
    pairs: dict[str, Pair] = {}
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # a Python built without ssl, sqlite3, lzma, ...
            continue
        for name, thing in public_members(module):
            prose = first_paragraph(inspect.getdoc(thing) or "")
            if not MIN_CHARACTERS <= len(prose) <= MAX_CHARACTERS or prose in pairs:
                continue
            call = signature(thing)
            call = call if len(call) <= 60 else "(...)"
            pairs[prose] = Pair(
                name=name.replace("posixpath.", "os.path."),
                question=f"What does `{name.replace('posixpath.', 'os.path.')}` do in Python?",
                answer=f"`{name.rsplit('.', 1)[-1]}{call}`: {prose}",
            )
    ordered = sorted(pairs.values(), key=lambda pair: pair.name)
    random.Random(seed).shuffle(ordered)
    return ordered


def split(
    pairs: list[Pair], *, num_train: int, num_held_out: int, ask: str = HELD_OUT_QUESTION
) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; the pair about `ask` is always held out, and comes first."""
    asked = [pair for pair in pairs if pair.name == ask]
    rest = [pair for pair in pairs if pair.name != ask]
    held_out = (asked + rest)[:num_held_out]
    train = rest[num_held_out - len(asked) :][:num_train]
    return train, held_out


def write_jsonl(pairs: list[Pair], path: Path) -> None:
    """One chat a line, in the `messages` format."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            messages = [
                {"role": "user", "content": pair.question},
                {"role": "assistant", "content": pair.answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
