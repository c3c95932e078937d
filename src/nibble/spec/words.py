"""From words to settings: how keys of a recipe, nibble's or another trainer's, become values.

A *layer* (built-in values, a file, the command line) is a flat list of words. Each word makes
claims on settings: `adapter: qlora` claims adapter.kind=lora and quant.format=nf4. Claims of one
layer must agree, so two words that say the same thing differently are an error that names both. A
later layer wins over an earlier one, and what it makes meaningless there is dropped:
`warmup_steps=10` on the command line replaces the file's `warmup_ratio`.

The tables of words are `aliases.py` (with `translations.py`) and `refusals.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nibble.errors import ConfigError

from . import schema
from .texts import nearest, show

Tree = dict[str, Any]
SOURCES = schema.SOURCE_PATHS
# Sections that are there or not: an empty mapping says that they are.
MAYBE = ("train.profile", "fit")
# One of each pair decides: a later layer that gives one takes the other back.
RIVALS = (
    ("optim.warmup_steps", "optim.warmup_ratio"),
    ("data.eval", "data.eval_rows"),
    ("train.max_steps", "train.epochs"),
    ("train.max_tokens", "train.epochs"),
    ("train.max_tokens", "train.max_steps"),
)


class Refused(Exception):
    """A translator cannot express this word; the text says why and what to do."""


@dataclass(frozen=True)
class Claim:
    """What one word says of one setting.

    set: the value. add: these items of a list, besides what other words add. deny: any value but
    this one. agree: nothing by itself, but the setting must end up with this value.
    """

    path: str
    value: Any
    mode: Literal["set", "add", "deny", "agree"] = "set"


@dataclass
class Layer:
    """The words of one source, and what is settled below it."""

    words: Mapping[str, Any]
    below: Tree
    texts: Mapping[str, str] = field(default_factory=dict)
    claims: list[tuple[str, Claim]] = field(default_factory=list)

    def says(self, *words: str) -> Any:
        """The first truthy value among these words of the layer, else None."""
        return next((self.words[word] for word in words if self.words.get(word)), None)

    def value(self, path: str) -> Any:
        """A setting as this layer leaves it: its own claim, else the layers below, else default."""
        for _, claim in self.claims:
            if claim.path == path and claim.mode == "set":
                return claim.value
        below = look_up(self.below, path)
        return schema.default(path) if below is None else below


Translator = Callable[[Any, Layer], Iterable[Claim]]


@dataclass(frozen=True)
class Late:
    """A translator that reads other settings of its layer, so it runs after the plain ones."""

    translate: Translator


@dataclass(frozen=True)
class Vocabulary:
    """The tables: words, synonyms of values by path, and refused words (pattern -> reason)."""

    aliases: Mapping[str, str | Translator | Late]
    values: Mapping[str, Mapping[Any, Any]]
    refusal: Callable[[str], str | None]


def flatten(
    mapping: Mapping[str, Any], vocabulary: Vocabulary, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted words of a nested mapping, down to the level where a word is known."""
    for key, value in mapping.items():
        word = f"{prefix}{key}"
        inner = any(alias.startswith(f"{word}.") for alias in vocabulary.aliases)
        known = word in schema.fields() or (vocabulary.refusal(word) and not inner)
        if isinstance(value, Mapping) and word in MAYBE:
            yield word, {}
            yield from flatten(value, vocabulary, f"{word}.")
        elif isinstance(value, Mapping) and value and not known:
            yield from flatten(value, vocabulary, f"{word}.")
        elif value is None and word in schema.sections():
            continue
        else:
            yield word, value


def claim_all(layer: Layer, vocabulary: Vocabulary) -> None:
    """Translate every word of a layer into claims.

    Raises ConfigError that lists every unknown, ambiguous and unsupported word in one line.
    """
    problems: list[str] = []
    late: list[tuple[str, Any, Translator]] = []
    for word, value in layer.words.items():
        try:
            meaning = _meaning(word, value, layer, vocabulary)
            if isinstance(meaning, Late):
                late.append((word, value, meaning.translate))
            else:
                layer.claims += [(word, _canonical(c, vocabulary)) for c in meaning]
        except Refused as refusal:
            problems.append(f"{word}: {refusal}")
    for word, value, translate in late:
        try:
            claims = [_canonical(c, vocabulary) for c in translate(value, layer)]
            layer.claims += [(word, claim) for claim in claims]
        except Refused as refusal:
            problems.append(f"{word}: {refusal}")
    problems += _conflicts(layer)
    if problems:
        raise ConfigError("; ".join(problems))


def _meaning(word: str, value: Any, layer: Layer, vocabulary: Vocabulary) -> Iterable[Claim] | Late:
    path = _native(word)
    if path is not None:
        return [Claim(path, _as_text(path, word, value, layer))]
    if word in vocabulary.aliases:
        if value is None:
            return []
        alias = vocabulary.aliases[word]
        if isinstance(alias, Late):
            return alias
        if isinstance(alias, str):
            return [Claim(alias, _as_text(alias, word, value, layer))]
        return list(alias(value, layer))
    candidates = schema.leaves().get(word, ())
    if len(candidates) == 1:
        return [Claim(candidates[0], _as_text(candidates[0], word, value, layer))]
    reason = vocabulary.refusal(word)
    if reason is not None:
        if not value:  # `deepspeed: null` and `streaming: false` ask for nothing
            return []
        raise Refused(reason)
    if candidates:
        raise Refused(f"could be {' or '.join(candidates)}: write one of them in full")
    raise Refused(_unknown(word, vocabulary))


def _native(word: str) -> str | None:
    """The path a word names in nibble's own language; a source's fields apply to every source."""
    if word in schema.fields():
        return word
    head, _, leaf = word.rpartition(".")
    return word if head in SOURCES and leaf in schema.source_fields() else None


def _as_text(path: str, word: str, value: Any, layer: Layer) -> Any:
    """Undo YAML where a text was meant: `run_name=5` on the command line names the run "5"."""
    head, _, leaf = path.rpartition(".")
    known = schema.fields().get(f"data.train[].{leaf}" if head in SOURCES else path)
    if known is None or word not in layer.texts or isinstance(value, str) or value is None:
        return value
    only_text = schema.accepts(known.annotation, str) and not isinstance(value, list | dict)
    return layer.texts[word] if only_text else value


def _canonical(claim: Claim, vocabulary: Vocabulary) -> Claim:
    """The claim with the value's own name, and a list where the setting is one."""
    synonyms = vocabulary.values.get(claim.path, {})
    value = claim.value
    known = schema.fields().get(claim.path)
    if claim.path not in SOURCES and known is not None and schema.accepts(known.annotation, tuple):
        if isinstance(value, str):
            value = _split(value)
        if isinstance(value, list | tuple):
            value = [_synonym(item, synonyms) for item in value]
    else:
        value = _synonym(value, synonyms)
    return Claim(claim.path, value, claim.mode)


def _split(text: str) -> list[str]:
    """`q_proj,v_proj` is two names; a regular expression with a comma stays whole."""
    if any(sign in text for sign in "{}()[]\\"):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _synonym(value: Any, synonyms: Mapping[Any, Any]) -> Any:
    if isinstance(value, list | dict):
        return value
    for name, canonical in synonyms.items():
        if name == value and isinstance(name, bool) == isinstance(value, bool):
            return canonical
        if isinstance(name, str) and isinstance(value, str) and name == value.lower():
            return canonical
    return value


def _conflicts(layer: Layer) -> list[str]:
    """Pairs of words of one layer that contradict each other."""
    first: dict[str, tuple[str, Any]] = {}
    problems = []
    for word, claim in layer.claims:
        if claim.mode != "set":
            continue
        other, value = first.setdefault(claim.path, (word, claim.value))
        if not _same(value, claim.value):
            here = f"{word}={show(layer.words[word])}"
            problems.append(
                f"{other}={show(layer.words[other])} and {here} disagree"
                f" about {claim.path}: keep one"
            )
    for word, claim in layer.claims:
        shown = f"{word}={show(layer.words[word])}"
        if claim.mode in ("deny", "add") and claim.path in first:
            other, value = first[claim.path]
            if claim.mode == "add" or _same(value, claim.value):
                problems.append(
                    f"{other}={show(layer.words[other])} and {shown} disagree about {claim.path}"
                )
        if claim.mode == "agree" and not _same(layer.value(claim.path), claim.value):
            settled = show(layer.value(claim.path))
            problems.append(
                f"{shown} differs from {claim.path}={settled}, which decides: remove it"
            )
    return problems


def _same(left: Any, right: Any) -> bool:
    left, right = (list(v) if isinstance(v, tuple) else v for v in (left, right))
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def apply(layer: Layer) -> Tree:
    """The settings below with this layer's claims on top."""
    tree: Tree = _copy(layer.below)
    given = {claim.path for _, claim in layer.claims if claim.mode == "set"}
    for pair in RIVALS:
        for mine, other in (pair, pair[::-1]):
            if mine in given and other not in given and layer.value(mine) is not None:
                put(tree, other, None, remove=True)
    added: dict[str, list[Any]] = {}
    # Whole lists of sources first, then the fields that apply to each of them.
    for word, claim in sorted(layer.claims, key=lambda item: item[1].path.count(".")):
        head, _, leaf = claim.path.rpartition(".")
        if claim.mode == "set" and claim.path in SOURCES:
            put(tree, claim.path, _sources(claim.value, look_up(tree, claim.path), word))
        elif claim.mode == "set" and head in SOURCES:
            put(tree, head, _with_field(look_up(tree, head), head, leaf, claim.value, word))
        elif claim.mode == "set":
            put(tree, claim.path, claim.value)
        elif claim.mode == "add":
            items = added.setdefault(claim.path, [])
            items += [item for item in claim.value if item not in items]
        elif claim.mode == "deny" and _same(look_up(tree, claim.path), claim.value):
            put(tree, claim.path, None, remove=True)
    for path, items in added.items():
        if path not in given:
            put(tree, path, items)
    return tree


def _sources(value: Any, below: Any, word: str) -> list[Tree]:
    """Data given as a path, a mapping or a list of these.

    A plain path put over a recipe's only source replaces where its rows come from and keeps how
    they are read (format, columns, template).
    """
    if isinstance(value, str):
        if isinstance(below, list) and len(below) == 1:
            kept = {k: v for k, v in below[0].items() if k not in ("path", "name", "split")}
            return [{"path": value, **kept}]
        return [{"path": value}]
    if isinstance(value, Mapping):
        return [dict(value)]
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{word}={show(value)}: give a path, a mapping with a path, or a list")
    found = []
    for item in value:
        if not isinstance(item, str | Mapping):
            raise ConfigError(f"{word}: {show(item)} is neither a path nor a mapping with a path")
        found.append({"path": item} if isinstance(item, str) else dict(item))
    return found


def _with_field(sources: Any, head: str, leaf: str, value: Any, word: str) -> list[Tree]:
    if not sources:
        if leaf != "path":
            raise ConfigError(
                f"{word}={show(value)}: there is no source to apply it to; give {head}"
            )
        return [{"path": value}]
    if leaf == "path" and len(sources) > 1:
        raise ConfigError(
            f"{word}={show(value)}: {head} has {len(sources)} sources; give the whole list"
        )
    return [{**source, leaf: value} for source in sources]


def look_up(tree: Tree, path: str) -> Any:
    """The value at a dotted path, or None."""
    here: Any = tree
    for part in path.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return None
        here = here[part]
    return here


def put(tree: Tree, path: str, value: Any, *, remove: bool = False) -> None:
    """Set or remove the value at a dotted path."""
    *sections, leaf = path.split(".")
    here = tree
    for part in sections:
        if not isinstance(here.get(part), dict):
            if remove:
                return
            here[part] = {}
        here = here[part]
    if remove:
        here.pop(leaf, None)
    elif path in MAYBE and value == {} and isinstance(here.get(leaf), dict):
        return  # its fields are set one by one
    else:
        here[leaf] = _copy(value)  # a synonym's value is its table's own


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _unknown(word: str, vocabulary: Vocabulary) -> str:
    """What to say of a word that no table knows."""
    leaf = word.rpartition(".")[2].replace("-", "_")
    paths = [path for path in schema.fields() if "[]" not in path]
    paths += [f"{head}.{name}" for head in SOURCES for name in schema.source_fields()]
    by_leaf = schema.leaves()
    exact = [leaf] if leaf in vocabulary.aliases else list(by_leaf.get(leaf, ()))
    near = exact or nearest(word, [*paths, *vocabulary.aliases])
    if not exact and ("." not in word or not near):
        for name in nearest(leaf, [*by_leaf, *vocabulary.aliases]):
            near += by_leaf.get(name, ()) or [name]
    shown: list[str] = []
    for name in near:
        alias = vocabulary.aliases.get(name)
        text = f"{name} ({alias})" if isinstance(alias, str) else name
        if text not in shown:
            shown.append(text)
    if not shown:
        return "unknown key; `nibble recipes --fields` lists all"
    return f"unknown key: did you mean {' or '.join(shown[:3])}?"
