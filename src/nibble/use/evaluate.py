"""How good a model is: perplexity of a text, loss on rows, metrics of a classification, ROUGE.

Perplexity is exp of the mean loss over all tokens of a text but the first of each window. Windows
do not overlap, as is usual for WikiText tables, so it depends on the context length, which is
reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nibble.data import Batch, Splits, one_pass
from nibble.errors import ConfigError, DataError
from nibble.models import Family
from nibble.place.base import Placement
from nibble.use.assemble import Assembly
from nibble.use.generate import Sampling, generate_batch
from nibble.use.metrics import classification_scores, rouge
from nibble.use.objective import call, held_out_loss, objective

Scores = dict[str, float | int]
DEFAULT_CONTEXT = 1024
LOSS_CHUNK_TOKENS = 1024
MAX_ANSWER_TOKENS = 256
ANSWERS_AT_ONCE = 32


def text_perplexity(
    model: nn.Module,
    assembly: Assembly,
    place: Placement,
    *,
    path: Path,
    context_length: int | None = None,
) -> Scores:
    """Perplexity of a UTF-8 text file in windows of `context_length` tokens.

    The default is 1024, or the model's context where that is shorter. Raises DataError for a file
    that is missing or holds no two tokens, ConfigError for a context that the model does not have.
    """
    if assembly.recipe.model.task != "causal-lm":
        raise ConfigError("--text is for language models, and this one classifies")
    limit = assembly.built.family.max_positions
    length = min(context_length or DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if context_length is not None and context_length > length:
        raise ConfigError(f"--context-length {context_length}: the model has {limit} positions")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from None
    ids = torch.tensor(assembly.tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise DataError(f"{path} has {len(ids)} tokens: there is nothing to predict")
    starts = range(0, len(ids) - 1, length)
    windows = [ids[start : start + length] for start in starts]
    loss = held_out_loss(
        model,
        (_window(window) for window in windows),
        place=place,
        objective=objective(assembly.built.family, task="causal-lm", chunk=LOSS_CHUNK_TOKENS),
    )
    assert loss is not None
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": sum(len(window) - 1 for window in windows),
        "context_length": length,
    }


def _window(ids: torch.Tensor) -> Batch:
    labels = torch.full((1, len(ids)), -100)
    labels[0, :-1] = ids[1:]
    return Batch(
        input_ids=ids[None],
        labels=labels,
        position_ids=None,
        attention_mask=None,
        num_targets=len(ids) - 1,
        num_tokens=len(ids),
        doc_lengths=((len(ids),),),
    )


def rows_scores(
    model: nn.Module,
    assembly: Assembly,
    place: Placement,
    *,
    splits: Splits,
    num_rows: int | None = None,
) -> Scores:
    """Loss on the held-out rows, with perplexity, or with the metrics of a classification."""
    rows = splits.eval
    assert rows is not None
    if num_rows is not None:
        rows = rows.select(torch.arange(min(num_rows, len(rows))))
    recipe = assembly.recipe
    task = recipe.model.task
    loss = objective(assembly.built.family, task=task, chunk=LOSS_CHUNK_TOKENS)
    batches = list(
        one_pass(
            rows,
            micro_batch_size=recipe.train.micro_batch_size,
            pad_id=assembly.tokenizer.pad_token_id,
        )
    )
    mean = held_out_loss(model, batches, place=place, objective=loss)
    assert mean is not None
    if task != "classification":
        return {
            "loss": mean,
            "perplexity": math.exp(mean),
            "rows": len(rows),
            "tokens": sum(batch.num_targets for batch in batches),
        }
    predictions, targets = _classify(model, batches, place, assembly.built.family)
    # The model's classes: the rows may hold fewer.
    num_labels = recipe.model.num_labels or splits.num_labels
    scores = classification_scores(predictions, targets, num_labels=num_labels)
    return {"loss": mean, **scores, "rows": len(rows)}


@torch.no_grad()
def _classify(
    model: nn.Module, batches: list[Batch], place: Placement, family: Family
) -> tuple[list[float], list[float]]:
    predictions: list[float] = []
    targets: list[float] = []
    for batch in batches:
        on_device = place.batch(batch)
        logits = call(model, on_device, family).logits.float()
        best = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)
        predictions += best.tolist()
        targets += batch.labels.tolist()
    return predictions, targets


def answers_rouge(model: nn.Module, assembly: Assembly, *, splits: Splits, num_rows: int) -> Scores:
    """Answer the first held-out questions greedily and compare with the given answers: ROUGE F1.

    Questions of similar length are answered together. Raises DataError for a question that leaves
    no room for an answer.
    """
    limit = assembly.built.family.max_positions
    tokenizer: Any = assembly.tokenizer
    if splits.eval_records is None:
        raise ConfigError("--rouge needs held-out rows with questions and answers")
    prompts: list[list[int]] = []
    rooms: list[int] = []
    references = []
    for record in islice(splits.eval_records, num_rows):
        ids = tokenizer(record.prompt, add_special_tokens=record.special_tokens)["input_ids"]
        room = MAX_ANSWER_TOKENS if limit is None else min(MAX_ANSWER_TOKENS, limit - len(ids))
        if room < 1:
            raise DataError(
                f"{record.source}: the question has {len(ids)} tokens and the model {limit} "
                "positions: there is no room for an answer; leave --rouge out or shorten it"
            )
        prompts.append(ids)
        rooms.append(room)
        references.append(record.reference)
    if not prompts:
        raise DataError(
            "no held-out row has a question and an answer: ROUGE has nothing to compare"
        )
    answers = [""] * len(prompts)
    for rows in _alike(prompts, rooms):
        how = Sampling(max_new_tokens=rooms[rows[0]], stop_ids=splits.stop_ids)
        texts = generate_batch(model, tokenizer, [prompts[i] for i in rows], sampling=how)
        for i, text in zip(rows, texts, strict=True):
            answers[i] = text.strip()
    return {**rouge(answers, references), "answers": len(answers)}


def _alike(prompts: list[list[int]], rooms: list[int]) -> Iterator[list[int]]:
    """Rows to answer together: the same room, so that no answer depends on its company, and
    neighbours in length, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, same in groupby(order, key=lambda i: rooms[i]):
        rows = list(same)
        for start in range(0, len(rows), ANSWERS_AT_ONCE):
            yield rows[start : start + ANSWERS_AT_ONCE]
