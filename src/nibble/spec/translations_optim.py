"""Words of other trainers about low-rank optimisers.

transformers names method, rule and mode in one word (`galore_adamw_8bit_layerwise`) and the options
in a text (`optim_args`); axolotl gives the same options as a mapping; LLaMA-Factory and ms-swift
have a word for each option with the method in front. Of APOLLO `scale` is the square of the factor
that its paper calls alpha and that `optim.scale` is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from .builtin_models import BUILTIN, SHAPES
from .methods import ALL_MATRICES
from .texts import show
from .words import Claim, Layer, Refused, Translator

NAMES = re.compile(
    r"(?P<method>galore|apollo|q_galore)_(?P<rule>adamw|adafactor)(?P<bits>_?8bit)?(?P<mode>_layerwise|_per_layer)?"
)
OPTIONS = {"rank": "rank", "update_proj_gap": "refresh_every", "scale": "scale",
           "proj_type": "side"}  # fmt: skip
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")


def optimizer_name(value: Any, layer: Layer) -> Iterator[Claim]:
    """`optim`, `optimizer`: a rule, or a low-rank method with its rule, codec and mode."""
    found = NAMES.fullmatch(str(value).lower())
    if found is None:
        yield Claim("optim.name", value)
        return
    yield Claim("optim.name", found["rule"])
    yield Claim("optim.method", found["method"].replace("_", "-"))
    if found["bits"]:
        yield Claim("optim.state", "8bit")
    if found["mode"]:
        yield Claim("optim.layerwise", True)


def optim_args(value: Any, layer: Layer) -> Iterator[Claim]:
    """`rank=128, update_proj_gap=200, scale=0.25, proj_type=std` and what AdamW takes."""
    pairs: dict[str, Any] = {}
    for part in str(value).split(","):
        key, equals, text = part.strip().partition("=")
        if not equals:
            raise Refused(f"{show(value)} is not a list of key=value")
        pairs[key.strip()] = _number(text.strip())
    for key, given in pairs.items():
        yield from _option(key, given, layer)


def option(key: str) -> Translator:
    """One of `optim_args`, given as a mapping."""
    return lambda value, layer: _option(key, value, layer)


def _option(key: str, value: Any, layer: Layer) -> Iterator[Claim]:
    plain = {"eps": "optim.eps", "weight_decay": "optim.weight_decay",
             "momentum": "optim.momentum"}  # fmt: skip
    if key == "scale":
        yield Claim("optim.scale", _scale(value, layer))
    elif key == "proj":
        yield Claim("optim.basis", _basis(value))
    elif key == "scale_type":
        yield Claim("optim.residual", value)
    elif key in OPTIONS:
        yield Claim(f"optim.{OPTIONS[key]}", value)
    elif key in plain:
        yield Claim(plain[key], value)
    else:
        known = ", ".join([*OPTIONS, "proj", "scale_type", *plain])
        raise Refused(f"{key}={show(value)} has no counterpart: one of {known}")


def _number(text: str) -> Any:
    if NUMBER.fullmatch(text) is None:
        return text
    return int(text) if text.isdigit() else float(text)


def _scale(value: Any, layer: Layer) -> Any:
    words = str(layer.says("optim", "optimizer", "optim.name", "optim.method") or "")
    return value**0.5 if "apollo" in words or layer.says("use_apollo") else value


def _basis(value: Any) -> str:
    names = {"random": "seeded", "svd": "svd"}
    if value not in names:
        raise Refused(f"{show(value)} is not one of random, svd")
    return names[value]


def use_method(name: str) -> Translator:
    """LLaMA-Factory and ms-swift: a boolean that chooses the method."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        quantised = name == "galore" and layer.says("galore_quantization")
        chosen = "q-galore" if quantised else name
        yield Claim("optim.method", chosen, "set" if value else "deny")

    return translate


def apollo_scale(value: Any, layer: Layer) -> Iterator[Claim]:
    """The square of alpha."""
    yield Claim("optim.scale", value**0.5)


def apollo_proj(value: Any, layer: Layer) -> Iterator[Claim]:
    """`random` is made from a seed at every step."""
    yield Claim("optim.basis", _basis(value))


def targets(value: Any, layer: Layer) -> Iterator[Claim]:
    """`all` and `all-linear` are every matrix but embeddings and heads; else names."""
    if value in ("all", ALL_MATRICES, ["all"], [ALL_MATRICES]):
        value = [ALL_MATRICES]
    yield Claim("optim.targets", value)


def of_adapter_or_projection(word: str) -> Translator:
    """`rank` and `targets` alone: the projection's where the recipe has one, else the adapter's."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        low = layer.value("optim.method") != "none" or layer.value("optim.rank") is not None
        yield Claim(f"{'optim' if low else 'adapter'}.{word}", value)

    return translate


def galore_shape(value: Any, layer: Layer) -> Iterator[Claim]:
    """GaLore's `configs/llama_60m.json`: the built-in shape, from scratch."""
    name = str(value).rpartition("/")[2].removesuffix(".json").replace("_", "-")
    if name not in SHAPES:
        raise Refused(f"{show(value)} is not one of the shapes {', '.join(SHAPES)}")
    yield Claim("model.path", f"{BUILTIN}{name}")
    yield Claim("model.from_scratch", True)
