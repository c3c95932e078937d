"""Block expansion: new blocks that begin as the identity and are trained while the rest stays
frozen (LLaMA-Pro).

A decoder block adds attention and MLP to its input, h + attention(h) + mlp(...). A copy of a block
whose output projections are zero therefore returns its input, and a model with such copies put in
computes exactly what it did before: training starts from the base and can only leave it where the
data asks. Wu et al. 2024, arXiv 2401.02415: the blocks are cut into `num_new` groups of equal size,
and the copy of a group's last block follows it.

Costs: `num_new` 16-bit blocks with gradients and optimiser states, and their compute; nothing else
changes. It works on the meta device: `expand_` puts the copies in, and the loader asks
`Expansion.targets_of` where a tensor of the checkpoint goes.

It is not for every family: with a norm behind the projection (Gemma 2 and later, OLMo 2) the first
update would take a block from zero to full size, and behind post-norms (BERT) a block cannot be the
identity. So the families are listed, each one tested, and others are refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nibble.errors import ConfigError

LLAMA_LIKE = ("self_attn.o_proj", "mlp.down_proj")
OUTPUT_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "qwen3_moe": ("self_attn.o_proj", "mlp.down_proj", "mlp.experts"),
    "mixtral": ("self_attn.o_proj", "mlp.experts"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}
"""model_type -> modules of a block that write into the residual stream (of experts: their down
projections)."""


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Where the new blocks are and what they are copies of.

    `blocks_name`: the list of blocks, such as `model.layers`. `source_of[i]`: the block of the
    checkpoint that position i holds. `positions`: the positions of new blocks. `zeroed`: full names
    of the parameters that are zero in new blocks.
    """

    blocks_name: str
    source_of: tuple[int, ...]
    positions: tuple[int, ...]
    zeroed: frozenset[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Module names of the new blocks: what must stay unquantised, and what is trained."""
        return tuple(f"{self.blocks_name}.{position}" for position in self.positions)

    def targets_of(self, name: str) -> Iterator[str]:
        """The parameters of the expanded model that a parameter of the checkpoint fills, zeroed
        ones included."""
        found = re.fullmatch(rf"{re.escape(self.blocks_name)}\.(\d+)\.(.+)", name)
        if found is None:
            yield name
            return
        for position, source in enumerate(self.source_of):
            if source == int(found[1]):
                yield f"{self.blocks_name}.{position}.{found[2]}"

    def value_of(self, target: str, value: torch.Tensor) -> torch.Tensor:
        """What `target`, one of `targets_of(...)`, is filled with: `value`, or zeros."""
        return torch.zeros_like(value) if target in self.zeroed else value


def plan_expansion(num_blocks: int, num_new: int) -> list[int]:
    """For each position of the expanded model, the block it holds: groups of even size, each one's
    last block twice.

    4 blocks and 2 new ones give [0, 1, 1, 2, 3, 3]. Raises ConfigError unless 1 <= num_new <=
    num_blocks.
    """
    if not 1 <= num_new <= num_blocks:
        raise ConfigError(
            f"adapter.num_new_blocks={num_new}: a model of {num_blocks} blocks takes 1 to "
            f"{num_blocks}"
        )
    ends = {(i + 1) * num_blocks // num_new - 1 for i in range(num_new)}
    return [block for block in range(num_blocks) for _ in range(2 if block in ends else 1)]


def expand_(model: nn.Module, blocks: nn.ModuleList, num_new: int) -> Expansion:
    """Put `num_new` identity copies among `blocks`, freeze the rest, renumber the layers and
    correct the config.

    Works on the meta device or on a loaded model (copies are then made with their values). `blocks`
    is the list of decoder blocks inside `model`. Raises ConfigError for a family whose blocks are
    not known to become the identity.
    """
    projections = _projections(model)
    source_of = plan_expansion(len(blocks), num_new)
    positions = tuple(i for i in range(1, len(source_of)) if source_of[i] == source_of[i - 1])
    blocks_name = next(name for name, module in model.named_modules() if module is blocks)
    old = list(blocks)
    model.requires_grad_(False)
    layers = [old[s] if i not in positions else _copied(old[s]) for i, s in enumerate(source_of)]
    zeroed: set[str] = set()
    for position in positions:
        layers[position].requires_grad_(True)
        found = _zero_outputs_(layers[position], projections)
        zeroed |= {f"{blocks_name}.{position}.{name}" for name in found}
    while len(blocks):
        del blocks[-1]
    blocks.extend(layers)
    for position, block in enumerate(blocks):
        _renumber_(block, position)
    _correct_config_(model, source_of)
    return Expansion(
        blocks_name=blocks_name,
        source_of=tuple(source_of),
        positions=positions,
        zeroed=frozenset(zeroed),
    )


def _copied(block: nn.Module) -> nn.Module:
    """A block with weights of its own and the model's config, by which its attention is chosen."""
    configs = (vars(module).get("config") for module in block.modules())
    return copy.deepcopy(block, {id(config): config for config in configs if config is not None})


def _projections(model: nn.Module) -> tuple[str, ...]:
    """The output projections of the model's family; ConfigError for one that is not listed."""
    config: Any = model.config
    family = config.model_type
    if family not in OUTPUT_PROJECTIONS or config.num_hidden_layers is None:
        raise ConfigError(
            f"adapter.kind=expand is not known to be an identity for {family}; "
            f"it works for {', '.join(sorted(OUTPUT_PROJECTIONS))}: use lora or dora instead"
        )
    if family == "gpt2" and config.scale_attn_by_inverse_layer_idx:
        raise ConfigError(
            "adapter.kind=expand would renumber the layers that scale_attn_by_inverse_layer_idx "
            "scales attention by; use lora or dora instead"
        )
    return OUTPUT_PROJECTIONS[family]


@torch.no_grad()
def _zero_outputs_(block: nn.Module, projections: tuple[str, ...]) -> list[str]:
    """Zero what writes into the residual stream, biases too; returns the names within the block."""
    zeroed = []
    for name, parameter in block.named_parameters():
        owner, _, leaf = name.rpartition(".")
        # Experts are stacks in one module: only their down projection writes into the stream.
        of_experts = owner.endswith("experts") and leaf.startswith("down_proj")
        if owner in projections and (of_experts or not owner.endswith("experts")):
            parameter.zero_()
            zeroed.append(name)
    written = {name.partition(".")[0] for name in zeroed}
    if len(written) < 2:
        raise ConfigError(
            f"adapter.kind=expand found output projections only under {sorted(written)} of a "
            f"{type(block).__name__} ({', '.join(projections)} expected); use lora or dora instead"
        )
    return zeroed


def _renumber_(block: nn.Module, position: int) -> None:
    for module in block.modules():
        if "layer_idx" in vars(module):
            vars(module)["layer_idx"] = position


def _correct_config_(model: nn.Module, source_of: list[int]) -> None:
    """Let the config describe the model as it is now: it is what an export writes."""
    config: Any = model.config
    config.num_hidden_layers = len(source_of)
    layer_types = vars(config).get("layer_types")
    if layer_types is not None:
        config.layer_types = [layer_types[source] for source in source_of]
    step = vars(config).get("decoder_sparse_step")
    if step is not None:
        # "every step-th block has experts" no longer holds: say which blocks have none instead.
        listed = config.mlp_only_layers or []
        dense = {i for i in source_of if i in listed or (i + 1) % step}
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [i for i, source in enumerate(source_of) if source in dense]
