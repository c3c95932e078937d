"""What is minimised: from a batch to the sum of the losses of its targets.

The decoder is called for hidden states and the head is left to the chunked loss, so that logits of
all tokens never exist; families whose logits are not a plain function of the head's output are
asked for them in full. Held-out loss is the same sum without gradients, over all targets: a mean
over tokens and not over batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.data.shapes import longest_document
from nibble.models import Family
from nibble.nn.attention import offsets_mask
from nibble.nn.loss import causal_lm_loss, classification_loss, full_logits_loss
from nibble.place.base import Placement

Objective = Callable[[nn.Module, Batch], Tensor]


def objective(family: Family, *, task: str, chunk: int) -> Objective:
    """The loss of a family and task: (model, batch on the model's device) -> summed loss, fp32
    scalar.

    chunk: tokens whose logits are alive at a time.
    """

    def classify(model: nn.Module, batch: Batch) -> Tensor:
        loss = classification_loss(call(model, batch, family).logits, batch.labels)[0]
        # A process without rows of its own passes one that must not count.
        return loss if batch.num_targets else loss * 0

    def next_token_of_logits(model: nn.Module, batch: Batch) -> Tensor:
        logits = call(model, batch, family).logits
        return full_logits_loss(logits, batch.labels, num_targets=batch.num_targets)[0]

    def next_token(model: nn.Module, batch: Batch) -> Tensor:
        head = family.head(model)
        assert head is not None
        hidden = call(family.decoder(model), batch, family)[0]
        return causal_lm_loss(
            hidden,
            batch.labels,
            head,
            chunk=chunk,
            transform=family.logits,
            num_targets=batch.num_targets,
        )[0]

    if task == "classification":
        return classify
    return next_token_of_logits if family.logits is None else next_token


def call(module: nn.Module, batch: Batch, family: Family) -> Any:
    """Call a transformers model with what the batch holds and the family takes.

    The mask of padding goes to classifiers only. Rows are padded on the right, so under a causal
    mask no token that counts sees padding, and padding itself has no targets: without the mask the
    loss and its gradients are the same, and attention may use its fast causal form.

    Only packed rows bring position ids: they start again with each document, and that is what tells
    documents apart. For the others the family counts in its own way (OPT and RoBERTa not from 0).
    """
    words: dict[str, object] = {"input_ids": batch.input_ids}
    is_classification = batch.labels.dim() == 1
    if batch.attention_mask is not None and is_classification:
        words["attention_mask"] = batch.attention_mask
    if batch.offsets is not None:
        longest = longest_document(batch)
        words["attention_mask"] = offsets_mask(batch.offsets, longest=longest)
    if batch.position_ids is not None:
        assert family.can_pack, "packed rows need a family that keeps documents apart"
        words["position_ids"] = batch.position_ids
    if batch.token_type_ids is not None:
        words["token_type_ids"] = batch.token_type_ids
    if "use_cache" in inspect.signature(module.forward).parameters:
        words["use_cache"] = False
    return module(**words)


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    place: Placement,
    objective: Objective,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss over all targets of `batches`, in nats a token (a row, in classification).

    None if `stop` asked to leave before the end. The model is left in the mode it was in.
    """
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros(2, dtype=torch.float64, device=place.device)
        for batch in batches:
            if stop():
                return None
            total[0] += objective(model, place.batch(batch)).double()
            total[1] += batch.num_targets
        loss, targets = place.sum(total).tolist()
    finally:
        model.train(was_training)
    return float(loss / max(targets, 1.0))
