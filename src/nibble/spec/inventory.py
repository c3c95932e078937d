"""Every tensor that a run holds for its model: packed, 16-bit and trained, in bytes, exactly.

Idea. Shapes come from `arch.py`, packed sizes from `formats.py`, optimiser state from `state.py`:
the tables that allocate are the tables that price. Which linears are packed, adapted or trained in
full follows the recipe by the same rules as `nn/quant.py` and `nn/adapters.py` (a test compares):
heads and embeddings are never packed, classification heads are always trained, `all-linear` is
every linear but the heads.

    LoRA adds rank (in + out) weights to a linear, DoRA a magnitude of out more.

It prices what exists between steps; activations and workspaces are `activations.py` and `plan.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from nibble.errors import ConfigError
from nibble.spec.activations import is_last
from nibble.spec.arch import Architecture
from nibble.spec.arch_types import Parameter
from nibble.spec.config import Adapter, Recipe
from nibble.spec.formats import DTYPE_BYTES, FormatSpec, TensorSpec, format_spec
from nibble.spec.learning import learning
from nibble.spec.names import covers, meets
from nibble.spec.workspace import packing_bytes, update_bytes

COMPUTE_DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Bytes and counts of a run's weights. `trained` holds the tensors that get gradients.

    `adapted`: module names with a low-rank update. `largest_packed`: weights of the largest packed
    matrix (0 without packing). `largest_tensor`: weights of the largest tensor of the checkpoint.
    """

    architecture: Architecture
    """With the blocks that an expansion adds."""
    spec: FormatSpec | None
    base_codes_bytes: int
    base_scales_bytes: int
    base_weights_bytes: int
    base_by_block: tuple[int, ...]
    """Frozen bytes of each block."""
    dense_by_block: tuple[int, ...]
    """Those of them that are not packed."""
    vectors_by_block: tuple[int, ...]
    """And of those the ones of one dim, which streaming leaves on the device."""
    trained_by_block: tuple[int, ...]
    """Trained bytes of each block."""
    trained: tuple[TensorSpec, ...]
    trained_bytes: int
    """Of the trained tensors as they are stored."""
    gradient_bytes: int
    """From backward to the update; as many as are trained, but for layer-wise mode."""
    passing_gradient_bytes: int
    """On top of them while backward runs: a whole gradient and sketches in layer-wise mode."""
    optimizer_bytes: int
    num_trainable: int
    num_total: int
    num_packed: int
    trained_blocks: frozenset[int]
    adapted: frozenset[str]
    num_adapter: int
    largest_packed: int
    largest_tensor: int
    embedding_trained: bool
    head_trained: bool

    head_element: int | None
    """Bytes of a number of the head, where it is trained."""
    head_gradient_bytes: int
    embedding_gradient_bytes: int
    last_packed: int
    """Weights of a block's last linear, with which backward begins while all is kept."""
    num_idle: int
    """Blocks below the first that is trained: no gradient comes to them."""
    packing_bytes: int
    """Beside the model, while its largest matrix is packed."""
    update_bytes: int
    """Beside all else, while the step is taken."""

    @cached_property
    def largest_trained_bytes(self) -> int:
        """Of the trained tensors the largest."""
        return max((tensor.nbytes for tensor in self.trained), default=0)

    @property
    def base_bytes(self) -> int:
        """Bytes of everything frozen."""
        return self.base_codes_bytes + self.base_scales_bytes + self.base_weights_bytes


def inventory(recipe: Recipe, architecture: Architecture) -> Inventory:
    """Price the weights of a run.

    Raises ConfigError for a format, target or module name that this model has no use for.
    """
    adapter, spec = recipe.adapter, format_spec(recipe.quant)
    compute = COMPUTE_DTYPE[recipe.train.precision]
    if adapter.kind == "none" and spec is not None:
        raise ConfigError(
            f"adapter.kind=none trains the base itself, which quant.format={spec.name} freezes; "
            "use adapter.kind=lora or quant.format=none"
        )
    added = _added_blocks(adapter, architecture)
    model = _expanded(architecture, added)
    packed = _packed(recipe, architecture, spec)
    saved = [*adapter.modules_to_save] if adapter.kind != "none" else []
    adapted = _adapted(adapter, architecture, saved)
    found = _Found()
    for parameter in model.parameters:
        dtype = _trained_dtype(recipe, parameter, saved, added)
        if adapter.kind == "factorised" and parameter.module in adapted and _is_matrix(parameter):
            found.replaced += parameter.size
        elif dtype is not None:
            found.trained[parameter.name] = TensorSpec(shape=parameter.shape, dtype=dtype)
        else:
            found.freeze(parameter, spec if parameter.name in packed else None, compute)
    trained = found.trained
    tables = _Tables.of(model, trained)
    block_of = {parameter.name: parameter.block for parameter in model.parameters}
    beside = _beside(recipe, architecture, adapted, block_of)
    num_adapter = sum(prod(tensor.shape) for tensor in beside.values())
    trained |= beside
    costs = learning(recipe.optim, trained)
    learnt = Counter[int | None]()
    for name, nbytes in costs.weights.items():
        learnt[block_of[name]] += nbytes
    sizes = [p.size for p in architecture.parameters]
    largest = max(
        (p.matrix for p in architecture.parameters if p.name in packed), key=prod, default=None
    )
    return Inventory(
        architecture=model,
        spec=spec,
        base_codes_bytes=found.codes,
        base_scales_bytes=found.scales,
        base_weights_bytes=found.weights,
        base_by_block=_of_blocks(found.by_block, model),
        dense_by_block=_of_blocks(found.dense, model),
        vectors_by_block=_of_blocks(found.vectors, model),
        trained_by_block=_of_blocks(learnt, model),
        trained=tuple(trained.values()),
        trained_bytes=sum(costs.weights.values()),
        gradient_bytes=costs.gradients,
        passing_gradient_bytes=costs.passing + costs.sketches,
        optimizer_bytes=costs.state,
        num_trainable=sum(prod(tensor.shape) for tensor in trained.values()),
        num_total=model.num_parameters - found.replaced + num_adapter,
        num_packed=sum(p.size for p in model.parameters if p.name in packed),
        trained_blocks=added,
        adapted=frozenset(adapted),
        num_adapter=num_adapter,
        largest_packed=0 if largest is None else prod(largest),
        largest_tensor=max(sizes, default=0),
        embedding_trained=bool(tables.embedding),
        head_trained=tables.head is not None,
        head_element=None if tables.head is None else DTYPE_BYTES[tables.head.dtype],
        head_gradient_bytes=0 if tables.head is None else tables.head.nbytes,
        embedding_gradient_bytes=tables.embedding,
        last_packed=max(
            (p.size for p in model.parameters if p.name in packed and is_last(p)), default=0
        ),
        num_idle=architecture.sizes.num_layers // len(added) if added else 0,
        packing_bytes=packing_bytes(spec, largest),
        update_bytes=update_bytes(recipe.optim, tuple(trained.values())),
    )


@dataclass
class _Found:
    """Bytes of what is frozen, in all and by block, and what is trained of the model itself."""

    codes: int = 0
    scales: int = 0
    weights: int = 0
    replaced: int = 0
    """Weights that factors take the place of."""
    by_block: Counter[int | None] = field(default_factory=Counter)
    dense: Counter[int | None] = field(default_factory=Counter)
    vectors: Counter[int | None] = field(default_factory=Counter)
    trained: dict[str, TensorSpec] = field(default_factory=dict)

    def freeze(self, parameter: Parameter, spec: FormatSpec | None, dtype: str) -> None:
        """Count a parameter that is stored packed, or without `spec` in `dtype`."""
        if spec is not None:
            tensors = spec.tensors(parameter.matrix)
            nbytes = spec.nbytes(parameter.matrix)
            self.codes += tensors["codes"].nbytes
            self.scales += nbytes - tensors["codes"].nbytes
            self.by_block[parameter.block] += nbytes
            return
        nbytes = parameter.size * DTYPE_BYTES[dtype]
        self.weights += nbytes
        self.by_block[parameter.block] += nbytes
        self.dense[parameter.block] += nbytes
        self.vectors[parameter.block] += nbytes if len(parameter.shape) == 1 else 0


@dataclass(frozen=True)
class _Tables:
    """The embedding and the head where they are trained: bytes of the largest embedding's gradient
    (0), and the head's tensor (None), which may be the embedding's."""

    embedding: int
    head: TensorSpec | None

    @staticmethod
    def of(model: Architecture, trained: dict[str, TensorSpec]) -> _Tables:
        by_kind = {
            kind: [
                trained[p.name] for p in model.parameters if p.kind == kind and p.name in trained
            ]
            for kind in ("embedding", "head")
        }
        heads = by_kind["embedding" if model.tied else "head"]
        return _Tables(
            embedding=max((tensor.nbytes for tensor in by_kind["embedding"]), default=0),
            head=max(heads, key=lambda tensor: tensor.nbytes, default=None),
        )


def _added_blocks(adapter: Adapter, architecture: Architecture) -> frozenset[int]:
    if adapter.kind != "expand":
        return frozenset()
    first = architecture.sizes.num_layers
    return frozenset(range(first, first + adapter.num_new_blocks))


def _expanded(architecture: Architecture, added: frozenset[int]) -> Architecture:
    """The architecture with copies of its first block; all blocks are alike in shape."""
    if not added:
        return architecture
    template = [p for p in architecture.parameters if p.block == 0]
    copies = [
        replace(p, name=p.name.replace(".0.", f".{index}.", 1), block=index)
        for index in sorted(added)
        for p in template
    ]
    sizes = replace(architecture.sizes, num_layers=architecture.sizes.num_layers + len(added))
    return replace(architecture, parameters=(*architecture.parameters, *copies), sizes=sizes)


def _packed(recipe: Recipe, architecture: Architecture, spec: FormatSpec | None) -> set[str]:
    """Names of the weights that the format stores."""
    if spec is None:
        return set()
    keep = recipe.quant.keep
    loose = [p for p in architecture.parameters if p.kind == "expert" and not covers(keep, p.name)]
    if loose:
        raise ConfigError(
            f"{loose[0].name} and {len(loose) - 1} others are stacks of experts, which "
            f"{spec.name} cannot store; keep them in 16 bit with quant.keep=[experts]"
        )
    linears = [p for p in architecture.parameters if p.kind == "linear"]
    found = {p.name for p in linears if not covers(keep, p.module)}
    if not found:
        raise ConfigError(
            f"quant.format={spec.name} finds no linear to store among {len(linears)}; "
            "use quant.format=none or keep fewer"
        )
    return found


def _beside(
    recipe: Recipe,
    architecture: Architecture,
    adapted: set[str],
    block_of: dict[str, int | None],
) -> dict[str, TensorSpec]:
    """The adapters' tensors by names of their own, which `block_of` learns."""
    found: dict[str, TensorSpec] = {}
    for parameter in architecture.parameters:
        for number, tensor in enumerate(_adapter_tensors(recipe, parameter, adapted)):
            name = f"{parameter.module}.adapter.{number}"
            found[name], block_of[name] = tensor, parameter.block
    return found


def _adapted(adapter: Adapter, architecture: Architecture, saved: list[str]) -> set[str]:
    """Module names that get a low-rank update."""
    if adapter.kind not in ("lora", "dora", "factorised"):
        return set()
    rows = [p for p in architecture.parameters if p.kind in ("linear", "head", "classifier")]
    rows = [p for p in rows if not p.name.endswith("bias")]
    found: set[str] = set()
    for target in adapter.targets:
        if target == "all-linear":
            met = {p.module for p in rows if p.kind == "linear"}
        else:
            met = {p.module for p in rows if meets(target, p.module)}
        if not met:
            leaves = sorted({p.module.rpartition(".")[2] for p in rows})
            raise ConfigError(
                f"adapter.targets: {target!r} names no linear layer; there are {', '.join(leaves)}"
            )
        found |= met
    heads = {p.module for p in rows if p.kind == "classifier"}
    return {name for name in found if name not in heads and not covers(saved, name)}


def _of_blocks(counts: Counter[int | None], model: Architecture) -> tuple[int, ...]:
    return tuple(counts[index] for index in range(model.sizes.num_layers))


def _adapter_tensors(
    recipe: Recipe, parameter: Parameter, adapted: set[str]
) -> Iterator[TensorSpec]:
    """What a low-rank update adds beside this parameter."""
    if parameter.module not in adapted or parameter.kind == "bias":
        return
    dtype, rank = _adapter_dtype(recipe), recipe.adapter.rank
    out, inside = parameter.matrix
    yield TensorSpec(shape=(rank, inside), dtype=dtype)
    yield TensorSpec(shape=(out, rank), dtype=dtype)
    if recipe.adapter.kind == "dora":
        yield TensorSpec(shape=(out,), dtype=dtype)


def _trained_dtype(
    recipe: Recipe, parameter: Parameter, saved: list[str], added: frozenset[int]
) -> str | None:
    """Type in which a parameter of the model is trained; None when it is frozen."""
    if recipe.adapter.kind in ("none", "factorised"):
        return "float32" if recipe.train.precision != "bf16" else "bfloat16"
    if parameter.block in added:
        return COMPUTE_DTYPE[recipe.train.precision]
    is_classifier = parameter.name.split(".")[0] in ("classifier", "score")
    if is_classifier or (saved and covers(saved, parameter.module)):
        return _adapter_dtype(recipe)
    return None


def _is_matrix(parameter: Parameter) -> bool:
    return parameter.kind != "bias" and not parameter.name.endswith("bias")


def _adapter_dtype(recipe: Recipe) -> str:
    if recipe.adapter.kind == "factorised":
        return "float32" if recipe.train.precision != "bf16" else "bfloat16"
    return "bfloat16" if recipe.train.adapter_precision == "bf16" else "float32"
