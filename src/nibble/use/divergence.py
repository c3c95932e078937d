"""How far one model's predictions are from another's.

    D = mean over targets of KL(p || q) = sum_v p_v (log p_v - log q_v),  nats a token

p is the trained model, q the exported one, on held-out rows. 0 means that the export is the trained
model; bf16 rounding of merged weights costs about 1e-3. The head is applied to a slice of the
positions at a time, so logits of all tokens never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nibble.data import Batch
from nibble.models import Family
from nibble.use.objective import call

CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Mean and largest KL in nats a token, share of equal best tokens, and over how many
    targets."""

    mean: float
    largest: float
    same_best: float
    num_targets: int


def hidden_and_head(
    model: nn.Module, family: Family, batch: Batch, *, task: str
) -> tuple[Tensor, nn.Module | None]:
    """States of the target positions [N, D] with the head to apply, or ready logits [N, V] and
    None."""
    if task == "classification":
        return call(model, batch, family).logits, None
    positions = batch.labels != -100
    if family.logits is None:
        return call(model, batch, family).logits[positions], None
    return call(family.decoder(model), batch, family)[0][positions], family.head(model)


@torch.no_grad()
def divergence(
    trained: nn.Module,
    exported: nn.Module,
    *,
    family: Family,
    batches: Sequence[Batch],
    task: str = "causal-lm",
) -> Divergence:
    """KL from the trained to the exported model over the targets of `batches`.

    Both models are on the device of the batches. Each is run once a batch.
    """
    values, same = [], []
    for batch in batches:
        p_states, p_head = hidden_and_head(trained, family, batch, task=task)
        q_states, q_head = hidden_and_head(exported, family, batch, task=task)
        for start in range(0, len(p_states), CHUNK):
            p_part, q_part = p_states[start : start + CHUNK], q_states[start : start + CHUNK]
            p = _log_probabilities(p_part, p_head, family)
            q = _log_probabilities(q_part, q_head, family)
            # Rounding alone may take the sum of equal distributions below zero.
            values.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
            same.append(p.argmax(-1) == q.argmax(-1))
    kl, best = torch.cat(values), torch.cat(same)
    return Divergence(
        mean=float(kl.mean()),
        largest=float(kl.max()),
        same_best=float(best.float().mean()),
        num_targets=kl.numel(),
    )


def _log_probabilities(states: Tensor, head: nn.Module | None, family: Family) -> Tensor:
    logits = states if head is None else head(states)
    if head is not None and family.logits is not None:
        logits = family.logits(logits)
    if logits.shape[-1] == 1:
        # Regression has no distribution: compare the values as if they were log-odds of one event.
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=-1)
    return logits.float().log_softmax(-1)
