"""A recipe's model, put together on the meta device: what training, chatting and exporting share.

    build -> expand -> quantise -> adapt, and the stream of weights that fills it

Nothing is loaded here, so it takes a second for any size. `fill` streams the weights through a
placement; `lazy.LazyModel` takes the same assembly and fills one block at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data import chat_template
from nibble.errors import ConfigError
from nibble.models import Built, build, load_tokenizer
from nibble.nn.adapters import (
    AdapterSummary,
    adapt_,
    adapters,
    finish_loading_,
    reset_parameters_,
    summarise,
)
from nibble.nn.expand import Expansion, expand_
from nibble.nn.factorised import factorise_, factorised
from nibble.nn.fused import FusedSummary, fuse_
from nibble.nn.int8_weights import int8_linears_
from nibble.nn.merging import merged_weights
from nibble.nn.quant import PackedWeight, quantize_
from nibble.place.activations import Activations
from nibble.place.base import Placement
from nibble.spec.builtin_models import is_builtin, rounded_vocabulary
from nibble.spec.config import Model, Recipe
from nibble.spec.formats import FormatSpec, format_spec
from nibble.spec.imports import without_collector
from nibble.spec.methods import has_int8_weights, low_rank, reasons
from nibble.use import packed
from nibble.weights import Stream, open_weights, stream

Value = Tensor | PackedWeight
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


Advance = Callable[[int, int], None]
"""A progress bar's side of a long phase: (done, total)."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model on meta with everything that is needed to fill, train and save it.

    `trained_names` are what a checkpoint of this recipe holds.
    """

    recipe: Recipe
    built: Built
    tokenizer: Any
    spec: FormatSpec | None
    expansion: Expansion | None
    summary: AdapterSummary
    weights: Stream | None
    trained_names: frozenset[str]
    fused: FusedSummary | None = None
    """What took fast paths; None if the recipe wants none."""

    @property
    def model(self) -> nn.Module:
        """The model, changed in place by whoever fills it."""
        return self.built.model

    def values(
        self,
        wanted: Callable[[str], bool] = lambda name: True,
        rows: Callable[[str], slice | None] = lambda name: None,
    ) -> Iterator[tuple[str, Value]]:
        """(name, value) of the base's parameters; random ones when training from scratch.

        `rows` says which rows of each are enough (None: all); a value may still come whole.
        """
        if self.weights is None:
            if not any(map(wanted, self.built.skeleton.state_dict())):
                return
            replaced = {f"{name}.weight" for name in factorised(self.model)}
            for name, tensor in self.built.random_weights(seed=self.recipe.train.seed):
                if wanted(name) and name not in replaced:
                    yield name, tensor
            return
        for name, value in self.weights.only(wanted, rows=rows):
            if self.expansion is not None and isinstance(value, Tensor):
                value = self.expansion.value_of(name, value)
            yield name, value


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The type that the model computes in."""
    return DTYPES[recipe.train.precision]


def storage_dtype(recipe: Recipe) -> torch.dtype:
    """The type of the base's 16-bit weights; fp32 where fp16 would lose the updates of what is
    trained."""
    trains_base = recipe.adapter.kind in ("none", "expand", "factorised")
    if recipe.train.precision == "fp16" and trains_base:
        return torch.float32
    return compute_dtype(recipe)


def adapter_dtype(recipe: Recipe) -> torch.dtype:
    """The type of what is trained beside the base."""
    if recipe.train.adapter_precision == "bf16":
        return torch.bfloat16
    return torch.float32


@without_collector()
def assemble(recipe: Recipe, *, num_labels: int | None = None, to_train: bool = True) -> Assembly:
    """Build, expand, quantise and adapt the recipe's model on the meta device.

    `num_labels` is what the data holds, where the recipe leaves it open. With `to_train` false a
    quantised base may stand alone, as it is only asked. Raises WeightError
    for a checkpoint that is missing, damaged or of another model, ConfigError for words that fit
    nothing.
    """
    words = recipe.model
    if words.task == "classification" and words.num_labels is None and num_labels is not None:
        words = words.model_copy(update={"num_labels": num_labels})
    words = _with_vocabulary(words)
    recipe = recipe.model_copy(update={"model": words})
    built = build(words, dtype=storage_dtype(recipe))
    model = built.model
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    tokenizer = load_tokenizer(words, num_embeddings=embeddings.num_embeddings)
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = chat_template(tokenizer, override=recipe.data.chat_template)
    if is_builtin(words.path):
        built.config.bos_token_id = tokenizer.bos_token_id
        built.config.eos_token_id = tokenizer.eos_token_id
    if words.task == "classification":
        # A decoder classifies by the last token that is no padding: it must know what pads here.
        built.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    weights = None
    spec = format_spec(recipe.quant)
    expansion = None
    if recipe.adapter.kind == "expand":
        blocks = model.get_submodule(built.family.block_path)
        assert isinstance(blocks, nn.ModuleList)
        expansion = expand_(model, blocks, recipe.adapter.num_new_blocks)
    if not words.from_scratch:
        source = open_weights(built.path)
        spec = _stored_format(spec, source.packed_spec, recipe, to_train=to_train)
        weights = stream(
            source,
            built.skeleton,
            transposed=built.transposed,
            targets_of=None if expansion is None else expansion.targets_of,
            initialise=built.initial_values if words.task == "classification" else None,
            seed=recipe.train.seed,
        )
    keep = (*recipe.quant.keep, *(expansion.names if expansion else ()))
    quantize_(model, spec, keep=keep, kernels=recipe.quant.kernels)
    summary = _adapt(model, recipe, expansion=expansion, to_train=to_train)
    if to_train and has_int8_weights(recipe.optim):
        _train_as_int8(model, recipe)
    fused = None
    if recipe.train.fused_kernels:
        fused = fuse_(model, built.family.decoder(model), dtype=compute_dtype(recipe))
    is_trained_whole = recipe.adapter.kind == "none" and spec is None
    trained = frozenset(
        name for name, p in model.named_parameters() if p.requires_grad or is_trained_whole
    )
    if recipe.optim.restart_every is not None:
        trained |= frozenset(merged_weights(model))
    return Assembly(
        recipe=recipe,
        built=built,
        tokenizer=tokenizer,
        spec=spec,
        expansion=expansion,
        summary=summary,
        weights=weights,
        trained_names=trained,
        fused=fused,
    )


def _adapt(
    model: nn.Module, recipe: Recipe, *, expansion: Expansion | None, to_train: bool
) -> AdapterSummary:
    """Put in what is trained beside the base, or in place of it, and freeze the rest."""
    adapter = recipe.adapter
    if not to_train and adapter.kind == "none":
        model.requires_grad_(False)
        return summarise(model, "none")
    if adapter.kind == "factorised":
        factorise_(model, adapter.targets, rank=adapter.rank)
        adapter = adapter.model_copy(update={"kind": "none"})  # all that is left is trained
    return adapt_(
        model,
        adapter,
        dtype=adapter_dtype(recipe),
        generator=torch.Generator().manual_seed(recipe.train.seed),
        expansion=expansion,
    )


def _train_as_int8(model: nn.Module, recipe: Recipe) -> None:
    """Let the linears whose gradients are projected keep their weights as INT8.

    Raises ConfigError for a projected tensor that is no linear's weight.
    """
    low = low_rank(recipe.optim)
    assert low is not None, "INT8 weights are those of a low-rank recipe"
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    why = reasons(recipe.optim, shapes, low=low)
    chosen = [name for name, reason in why.items() if reason is None]
    for name in chosen:
        owner, _, leaf = name.rpartition(".")
        if leaf != "weight" or type(model.get_submodule(owner)) is not nn.Linear:
            raise ConfigError(
                f"optim.weights=int8 keeps weights of linears, and {name} is none: name others in "
                "optim.targets, or use optim.weights=float"
            )
    owners = "|".join(re.escape(name.removesuffix(".weight")) for name in chosen)
    int8_linears_(model, f"^(?:{owners})$")


def _with_vocabulary(words: Model) -> Model:
    """A built-in shape with as many embedding rows as its tokenizer asks for."""
    if not is_builtin(words.path) or words.vocab_size is not None:
        return words
    largest = max(load_tokenizer(words).get_vocab().values())
    return words.model_copy(update={"vocab_size": rounded_vocabulary(largest + 1)})


def _stored_format(
    wanted: FormatSpec | None, stored: FormatSpec | None, recipe: Recipe, *, to_train: bool
) -> FormatSpec | None:
    """The format of the frozen base: a checkpoint that is quantised already keeps its own."""
    if stored is None or wanted == stored:
        return wanted
    if wanted is None:
        if to_train and recipe.adapter.kind == "none":
            raise ConfigError(
                f"{recipe.model.path} is quantised to {stored.name} already and cannot be trained "
                "in full: set adapter.kind=lora, or take the original model"
            )
        return stored
    if wanted.name == stored.name:
        return stored
    raise ConfigError(
        f"{recipe.model.path} is quantised to {stored.name} already, the recipe asks for "
        f"{wanted.name}: leave quant.format out, or take the original model"
    )


def fill(
    assembly: Assembly,
    place: Placement,
    *,
    activations: Activations,
    advance: Advance | None = None,
    note: packed.Note = lambda text: None,
) -> nn.Module:
    """Give the model storage where it will live and stream its weights in, quantised on arrival.

    `note` is told when the packed base could not be kept for the next start.
    """
    model = place.arrange(assembly.built, activations=activations)
    total = 0 if assembly.weights is None else len(assembly.weights)
    for done, (name, value) in enumerate(packed.values(assembly, place, note=note), start=1):
        place.load(model, name, value)
        if advance is not None:
            advance(done, max(total, done))
    generator = torch.Generator().manual_seed(assembly.recipe.train.seed)
    reset_parameters_(model, generator=generator, put=place.put_)
    for part in place.parts(model):
        finish_loading_(part)
    fresh = [p for a in adapters(model).values() for p in a.parameters(recurse=False)]
    for name, linear in factorised(model).items():
        linear.reset_parameters_(
            name, generator=torch.Generator().manual_seed(assembly.recipe.train.seed)
        )
        fresh += [linear.low_a, linear.low_b]
    place.check_loaded(model, initialised=fresh)
    return model
