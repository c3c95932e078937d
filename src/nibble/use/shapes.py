"""The shape of whatever can be trained: from its config, its weights' headers, or built on meta.

    known family            its table (spec/arch_families.py)                 source "config"
    unknown, with weights   names and shapes in the headers of its files      source "headers"
    unknown, without        the model itself, built on the meta device        source "meta"

The last takes torch, transformers and a second or two, so it is tried last; the plan says where its
shapes are from. Blocks of unknown families are taken to be a Llama's as far as activations go.
"""

from __future__ import annotations

from nibble.errors import ConfigError, PlanError, WeightError
from nibble.spec.arch import Architecture, architecture, from_headers
from nibble.spec.config import Model
from nibble.spec.headers import TensorHeader


def shapes(model: Model, *, num_labels: int | None = None) -> Architecture:
    """The shape of the model that a recipe names; `num_labels` overrides the recipe's and config's.

    Raises WeightError for a model that is not there, PlanError for one that cannot be built either.
    """
    try:
        return architecture(model, num_labels=num_labels)
    except PlanError as unknown:
        reason = str(unknown)
    try:
        return built_shapes(model, num_labels=num_labels)
    except (ConfigError, WeightError, PlanError) as failure:
        raise PlanError(f"{reason}; nor can it be built on the meta device: {failure}") from None


def built_shapes(model: Model, *, num_labels: int | None = None) -> Architecture:
    """The shape of the model as transformers builds it on the meta device."""
    import torch

    from nibble.models import build

    words = {} if num_labels is None else {"num_labels": num_labels}
    # A random model is built where the weights are not there: nothing is read or allocated.
    wanted = model.model_copy(update={"from_scratch": True, **words})
    built = build(wanted, dtype=torch.bfloat16)
    headers = {
        name: TensorHeader(shape=tuple(parameter.shape), dtype="BF16", nbytes=parameter.nbytes)
        for name, parameter in built.skeleton.named_parameters()
    }
    return from_headers(built.config.to_dict(), headers, source="meta")
