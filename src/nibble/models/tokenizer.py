"""The tokenizer of a model, from its folder, a hub id or inside a GGUF file, checked against the
vocabulary.

No token is ever added: embeddings keep their size. A tokenizer without a padding token borrows a
reserved or the end token as filler only; what is learnt is decided by label masks, which never look
at token values.
"""

from __future__ import annotations

from typing import Any

from nibble.errors import WeightError
from nibble.models.gguf_cache import read_tokenizer
from nibble.models.locate import locate
from nibble.spec.builtin_models import DEFAULT_TOKENIZER, is_builtin
from nibble.spec.config import Model

PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|vision_pad|>",
    "<unk>",
)
"""Tokens that may serve as filler, best first, if the vocabulary has them."""


def load_tokenizer(model: Model, *, num_embeddings: int | None = None) -> Any:
    """The tokenizer that a recipe's model uses, with a padding token and padding on the right.

    `num_embeddings` (rows of the embedding) makes a vocabulary that does not fit a WeightError, as
    is a missing tokenizer.
    """
    from transformers import AutoTokenizer

    named = model.tokenizer or (DEFAULT_TOKENIZER if is_builtin(model.path) else model.path)
    own = named == model.path
    path = locate(
        named,
        revision=model.revision if own else None,
        with_code=model.trust_remote_code,
        with_weights=own and not model.from_scratch,
    )
    try:
        if path.suffix == ".gguf":
            tokenizer = read_tokenizer(path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=model.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise WeightError(
            f"{path} has no tokenizer that can be read ({reason}): set model.tokenizer to a "
            "folder or hub id"
        ) from None
    if num_embeddings is not None:
        check_vocabulary(tokenizer, num_embeddings=num_embeddings, name=named)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        _borrow_pad_token_(tokenizer)
    return tokenizer


def check_vocabulary(tokenizer: Any, *, num_embeddings: int, name: str) -> None:
    """Raise WeightError when the tokenizer can produce an id that has no embedding row."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise WeightError(
            f"the tokenizer of {name} has ids up to {largest}, but the model has "
            f"{num_embeddings} embedding rows: "
            "they do not belong together; set model.tokenizer to the model's own"
        )


def _borrow_pad_token_(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in vocabulary:
            tokenizer.pad_token = token
            return
    if tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
