"""From a run to files that the rest of the ecosystem loads, with proof.

`adapter` is peft's folder, `merged` the base with the adapter added in, `hf` a model that was
trained in full or expanded; the last two are ordinary Hugging Face folders of safetensors. The
model passes through one block at a time, so the peak on the host is one block. Afterwards the
folder is read back from the disk, and its predictions on held-out rows are compared with the
trained model's (`divergence.py`): an export further away than the bound is removed again.

What is merged is the base as it was stored in training, quantisation error included: that is the
model that the adapter was trained on, and adding the update to the original 16-bit weights instead
would be another model.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.errors import ConfigError, ExportError
from nibble.nn.adapters import LoraLinear
from nibble.nn.quant import QuantLinear
from nibble.spec.config import Adapter, Quant, Recipe
from nibble.use.assemble import Assembly, assemble, compute_dtype, storage_dtype
from nibble.use.divergence import Divergence, divergence
from nibble.use.generate import stop_tokens
from nibble.use.lazy import LazyModel
from nibble.weights import Shape, write_sharded
from nibble.weights.adapter_files import load_adapter, save_adapter

KINDS = ("adapter", "merged", "hf")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Where the export lies and how far it is from the trained model."""

    folder: Path
    kind: str
    divergence: Divergence
    num_bytes: int


def check_kind(kind: str, recipe: Recipe) -> None:
    """Raise ConfigError when a run of this recipe has no such export."""
    if kind not in KINDS:
        raise ConfigError(f"--to {kind} is none of {', '.join(KINDS)}")
    has_adapter = recipe.adapter.kind in ("lora", "dora")
    if recipe.adapter.kind == "factorised":
        raise ConfigError(
            "a model of factors (adapter.kind=factorised) has no form that other libraries load: "
            "use nibble chat and nibble eval on the run"
        )
    if kind in ("adapter", "merged") and not has_adapter:
        raise ConfigError(
            f"--to {kind} needs a LoRA or DoRA adapter, and this run trained "
            f"{'new blocks' if recipe.adapter.kind == 'expand' else 'the whole model'}: use --to hf"
        )
    if kind == "hf" and has_adapter:
        raise ConfigError(
            "--to hf is for runs that trained the model itself; this one trained an adapter: use "
            "--to merged for a model folder, or --to adapter for peft's files"
        )


def export(
    recipe: Recipe,
    trained: Mapping[str, Tensor],
    *,
    kind: str,
    folder: Path,
    batches: Sequence[Batch],
    device: torch.device,
    max_divergence: float,
    label_names: Sequence[str] = (),
    progress: Progress | None = None,
) -> Exported:
    """Write `folder`, read it back and compare; on the given held-out batches.

    `trained` are the tensors of the run's checkpoint; `label_names` go into a classifier's
    config.json. Raises ExportError when the folder holds
    something else already, when an adapter's update is zero, or when the mean divergence is above
    `max_divergence`; what was written is then removed.
    """
    check_kind(kind, recipe)
    _refuse_occupied(folder)
    _refuse_empty_updates(trained)
    say = progress or (lambda what, done, total: None)
    assembly, model = _lazy(recipe, trained, device=device)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if kind == "adapter":
            words, task = recipe.adapter, recipe.model.task
            save_adapter(model.model, part, base_name=recipe.model.path, adapter=words, task=task)
            copy_recipe, copy_trained = recipe, dict(trained)
        else:
            _name_labels_(assembly.built.model.config, label_names)
            _write_dense(assembly, model, part, say=say)
            copy_recipe, copy_trained = _plain(recipe, part), {}
        assembly.tokenizer.save_pretrained(part)
        say("comparing with the trained model", 0, 1)
        _, copy = _lazy(copy_recipe, copy_trained, device=device)
        if kind == "adapter":
            _forget_(copy.model)
            load_adapter(copy.model, part)
        distance = divergence(
            model.model, copy.model, family=model.family, batches=batches, task=recipe.model.task
        )
        say("comparing with the trained model", 1, 1)
        if not distance.mean <= max_divergence:
            raise ExportError(
                f"the exported model is {distance.mean:.4g} nats a token from the trained one, "
                f"above the bound of {max_divergence:g} (export.max_divergence): nothing was kept"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ExportError(
            f"the disk of {folder} is full: make room or choose another with --out; nothing was "
            "kept"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return Exported(folder=folder, kind=kind, divergence=distance, num_bytes=num_bytes)


def _refuse_occupied(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists already: name another with --out, or remove it")
    if folder.exists():
        folder.rmdir()


def _refuse_empty_updates(trained: Mapping[str, Tensor]) -> None:
    """An adapter whose every B is zero has learnt nothing, or was saved from the wrong shard."""
    names = [name for name in trained if name.endswith(".lora_B")]
    if names and not any(bool(trained[name].any()) for name in names):
        raise ExportError(
            f"all {len(names)} adapters of the checkpoint are zero: it was written before the "
            "first update; export a later one"
        )


def _name_labels_(config: Any, names: Sequence[str]) -> None:
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


def _lazy(
    recipe: Recipe,
    trained: Mapping[str, Tensor],
    *,
    device: torch.device,
) -> tuple[Assembly, LazyModel]:
    assembly = assemble(recipe, to_train=False)
    small = recipe.adapter.kind in ("lora", "dora")
    return assembly, LazyModel(
        assembly.built,
        values=assembly.values,
        trained=trained,
        device=device,
        hold_trained=small,
    )


def _plain(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of the exported model itself: no quantisation, no adapter."""
    model = recipe.model.model_copy(
        update={"path": str(folder), "revision": None, "tokenizer": None, "from_scratch": False}
    )
    return recipe.model_copy(update={"model": model, "quant": Quant(), "adapter": Adapter()})


@torch.no_grad()
def _forget_(model: nn.Module) -> None:
    """Ruin every trained value, so that only the files can bring it back."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(float("nan"))


def _write_dense(assembly: Assembly, model: LazyModel, folder: Path, *, say: Progress) -> None:
    """The model as an ordinary Hugging Face folder, block by block."""
    built = assembly.built
    # The skeleton is the family's own; expansion moved its blocks and repeated some.
    targets_of = assembly.expansion.targets_of if assembly.expansion else lambda name: (name,)
    transposed = frozenset(target for name in built.transposed for target in targets_of(name))
    kept = {
        target: tensor.dtype
        for name, tensor in built.skeleton.state_dict(keep_vars=True).items()
        for target in targets_of(name)
    }
    stored, computed = storage_dtype(assembly.recipe), compute_dtype(assembly.recipe)

    def dtype_of(name: str) -> torch.dtype:
        # What the family keeps in fp32 stays there; all else is written as it was computed.
        own = kept.get(name, stored)
        return computed if own == stored else own

    shapes = {
        name: Shape(shape=shape, dtype=dtype_of(name))
        for name, shape in dense_shapes(model.model, transposed=transposed).items()
    }
    tensors = _dense_tensors(model, shapes, transposed=transposed, say=say)
    write_sharded(folder, shapes, tensors)
    config: Any = built.model.config
    config.architectures = [type(built.model).__name__]
    config.dtype = computed
    config.save_pretrained(folder)
    generation: Any = getattr(built.model, "generation_config", None)
    if generation is not None and assembly.recipe.model.task == "causal-lm":
        generation.eos_token_id = stop_tokens(built.model, assembly.tokenizer) or None
        generation.save_pretrained(folder)


def dense_shapes(
    model: nn.Module, *, transposed: frozenset[str] = frozenset()
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors as a checkpoint calls them, adapters folded in."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape, _ in _dense(model, transposed):
        shapes[name] = shape
    return shapes


def _dense(
    model: nn.Module, transposed: frozenset[str]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[torch.dtype], Tensor]]]:
    """(name, shape, how to make it) of every stored tensor; tied ones once."""
    seen: set[int] = set()
    inside: tuple[str, ...] = ()
    persistent = set(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, LoraLinear | QuantLinear):
            inside = (*inside, f"{path}.")
            made = module.merged_weight if isinstance(module, LoraLinear) else module.dense
            yield _oriented(f"{path}.weight", _weight_shape(module), made, transposed)
            base = module.base if isinstance(module, LoraLinear) else module
            if isinstance(base.bias, Tensor):
                yield f"{path}.bias", tuple(base.bias.shape), _cast(base.bias)
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in own:
            name = f"{path}.{leaf}" if path else leaf
            if id(tensor) in seen or name not in persistent:
                continue
            seen.add(id(tensor))
            yield _oriented(name, tuple(tensor.shape), _cast(tensor), transposed)


def _weight_shape(module: LoraLinear | QuantLinear) -> tuple[int, int]:
    return module.out_features, module.in_features


def _cast(tensor: Tensor) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)


def _oriented(
    name: str,
    shape: tuple[int, ...],
    make: Callable[[torch.dtype], Tensor],
    transposed: frozenset[str],
) -> tuple[str, tuple[int, ...], Callable[[torch.dtype], Tensor]]:
    if name not in transposed:
        return name, shape, make
    return name, shape[::-1], lambda dtype: make(dtype).t()


def _dense_tensors(
    model: LazyModel,
    shapes: Mapping[str, Shape],
    *,
    transposed: frozenset[str],
    say: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `shapes`: what lies outside the blocks first, then one block at a time."""
    prefix = f"{model.family.block_path}."
    for name, _, make in _dense(model.model, transposed):
        if not name.startswith(prefix):
            yield name, make(shapes[name].dtype).contiguous().cpu()
    for done, path in enumerate(model.blocks, start=1):
        with model.filled(path) as block:
            own = frozenset(n.removeprefix(f"{path}.") for n in transposed)
            for leaf, _, make in _dense(block, own):
                name = f"{path}.{leaf}"
                yield name, make(shapes[name].dtype).contiguous().cpu()
        say("writing", done, len(model.blocks))
