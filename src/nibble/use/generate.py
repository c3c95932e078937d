"""Answers from a model, token by token.

transformers' `generate` does the work (KV cache, sampling, stop tokens of every family); this
module renders the prompt, hands on text as it is made, and stops cleanly. The prompt is never
echoed. A model without a chat template is given the plain prompt (alpaca's for its own fine-tunes
is the data floor's business: `render` takes any text function).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nibble.use.conversation import Message


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and what ends an answer. temperature 0 is greedy.

    `stop_ids` are tokens besides the model's own; `stop_texts` end the answer where they begin and
    are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()


def render(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the prompt: the chat template with the assistant's turn opened, else plain
    text."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "\n\n".join(message["content"] for message in messages)
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers close every text with eos; a prompt must stay open.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


class Streamer:
    """Turns token ids into text pieces that can be printed at once (no half characters or words).

    The contract is transformers' (`put`, `end`): the first `put` is the prompt and is skipped. Text
    that may be the beginning of a stop text waits until it is certain; `stopped` is set by a whole
    one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        on_text: Callable[[str], None],
        stop_texts: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.stop_ids = frozenset(stop_ids)
        self.stop_texts = tuple(stop_texts)
        self.stopped = False
        self.ids: list[int] = []
        self.shown = 0
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        # Not every token that ends an answer is a special one, which decoding would skip.
        self.ids.extend(i for i in value.reshape(-1).tolist() if i not in self.stop_ids)
        text = self.text()
        # A character that is not complete yet decodes to U+FFFD: wait for the rest of it.
        if not text.endswith("\ufffd"):
            self._show(text[: len(text) - self._uncertain(text)])

    def end(self) -> None:
        self._show(self.text())

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)

    def _uncertain(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        lengths = [
            length
            for stop in self.stop_texts
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ]
        return 0 if self.stopped else max(lengths, default=0)

    def text(self) -> str:
        """All of the answer so far, up to the first stop text."""
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        found = [at for stop in self.stop_texts if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        return text[: min(found)] if found else text


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the model's own, the tokenizer's, and the template's turn
    end."""
    found: list[int] = []
    configured = getattr(model.generation_config, "eos_token_id", None)
    for token in configured if isinstance(configured, list) else [configured]:
        if token is not None:
            found.append(int(token))
    if tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    for text in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
        token = tokenizer.convert_tokens_to_ids(text)
        if token is not None and token != tokenizer.unk_token_id:
            found.append(int(token))
    return sorted(set(found))


def _config(sampling: Sampling, tokenizer: Any, stops: Sequence[int]) -> Any:
    """transformers' words for how tokens are chosen and where an answer ends."""
    from transformers import GenerationConfig

    sampled = sampling.temperature > 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampled,
        temperature=sampling.temperature if sampled else None,
        top_p=sampling.top_p if sampled else None,
        top_k=(sampling.top_k or None) if sampled else None,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(stops) or None,
        pad_token_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else stops[0]
        if stops
        else 0,
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    *,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The answer to a prompt, without the prompt.

    `on_text` receives each piece of text as soon as it is certain. KeyboardInterrupt ends the
    answer and is raised again after the streamer was flushed.
    """
    from transformers import StoppingCriteriaList

    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.tensor([list(prompt_ids)], device=device)
    stops = sorted({*stop_tokens(model, tokenizer), *sampling.stop_ids})
    streamer = Streamer(
        tokenizer,
        on_text=on_text or (lambda text: None),
        stop_texts=sampling.stop_texts,
        stop_ids=stops,
    )

    def stopped(made: torch.Tensor, _scores: torch.Tensor, **_words: Any) -> torch.Tensor:
        # transformers hands tokens on while it makes the next ones: noticed a token or two later.
        return torch.full((made.shape[0],), streamer.stopped, device=made.device)

    config = _config(sampling, tokenizer, stops)
    if sampling.temperature > 0 and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stopped]) if sampling.stop_texts else None,
        )
    except KeyboardInterrupt:
        streamer.end()
        raise
    finally:
        model.train(was_training)
    return streamer.text()


@torch.no_grad()
def generate_batch(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
) -> list[str]:
    """The answers to prompts of any lengths, all at once and without the prompts.

    A step of a batch costs about what a step of one row does, so n answers take the time of the
    longest. Prompts are padded on the left and the padding is masked: greedy answers are those of
    `generate` but for ties within rounding. `sampling.stop_texts` is for one row only.
    """
    assert prompts and not sampling.stop_texts
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    stops = sorted({*stop_tokens(model, tokenizer), *sampling.stop_ids})
    config = _config(sampling, tokenizer, stops)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    if sampling.temperature > 0 and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    try:
        made = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    finally:
        model.train(was_training)
    answers = []
    for row in made[:, width:].tolist():
        end = next((at for at, token in enumerate(row) if token in stops), len(row))
        answers.append(str(tokenizer.decode(row[:end], skip_special_tokens=True)))
    return answers
