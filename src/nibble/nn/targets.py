"""Which modules a word means: names, suffixes, regular expressions, heads and tied weights.

A pattern meets a module name as in peft, so that one list of targets works for both: the whole
name, its last parts (`q_proj` meets `model.layers.0.self_attn.q_proj`), or a regular expression
that matches the whole name. A pattern that meets nothing is an error with the nearest names: a typo
would otherwise train something else, or nothing.

Linears that no method touches unless told: the output head (its rounding error goes straight into
the logits) and the classification heads (they are trained in full). Both are found by structure:
`get_output_embeddings`, and the names that transformers gives to heads.

It reads names and shapes only; it changes nothing but in `replace_`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from nibble.errors import ConfigError
from nibble.spec.names import covers

CLASSIFICATION_HEADS = ("score", "classifier", "pre_classifier", "classification_head")
"""Children of a transformers classification model that a pretrained checkpoint does not hold."""


@runtime_checkable
class HasOutputHead(Protocol):
    """What a transformers model offers; a plain module has no head."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The module that makes logits."""


def require_all(patterns: Iterable[str], names: Sequence[str], *, option: str) -> None:
    """Raise ConfigError for the first pattern that covers none of `names`; it says the nearest last
    parts."""
    for pattern in patterns:
        if not any(covers((pattern,), name) for name in names):
            raise ConfigError(f"{option}: {pattern!r} names no module; {nearest(pattern, names)}")


def nearest(pattern: str, names: Iterable[str]) -> str:
    """`nearest: q_proj, k_proj`: the last parts of `names` that look most like `pattern`."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(pattern.rpartition(".")[2], leaves, n=4, cutoff=0.4)
    shown = close or leaves[:12]
    return f"{'nearest' if close else 'there are'}: {', '.join(shown) or 'none'}"


def head_names(model: nn.Module) -> set[str]:
    """Names of the output head, the classification heads and everything within them."""
    tops = {name for name, _ in model.named_children() if name in CLASSIFICATION_HEADS}
    if isinstance(model, HasOutputHead):
        head = model.get_output_embeddings()
        tops |= {name for name, module in model.named_modules() if module is head}
    return {
        name
        for name, _ in model.named_modules()
        if any(name == top or name.startswith(f"{top}.") for top in tops)
    }


def classification_heads(model: nn.Module) -> list[str]:
    """Names of the heads that a classification model trains from scratch."""
    return [name for name, _ in model.named_children() if name in CLASSIFICATION_HEADS]


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of parameters that are one tensor, one tuple a tensor (tied embeddings)."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def stacked_parameters(model: nn.Module) -> Iterator[str]:
    """Names of stacks of matrices (a mixture's experts): 3-D parameters that no convolution
    owns."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for prefix, module in model.named_modules():
        if isinstance(module, convolutions):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                yield f"{prefix}.{name}" if prefix else name


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
