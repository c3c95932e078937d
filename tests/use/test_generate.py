"""Streaming text: complete characters only, never the prompt, the same tokens as transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nibble.use.generate import Sampling, Streamer, generate, render, stop_tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Every byte is a token: the hardest case for text that arrives piece by piece."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tokenizer: Any) -> None:
    pieces: list[str] = []
    streamer = Streamer(tokenizer, on_text=pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    ids = tokenizer("aé€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 1
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == ["a", "é", "€", "b"]


def test_the_answer_is_transformers_own_and_holds_no_prompt(tokenizer: Any, model: Any) -> None:
    ids = render(tokenizer, [{"role": "user", "content": "hello"}])
    text = tokenizer.decode(ids)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    pieces: list[str] = []
    answer = generate(
        model, tokenizer, ids, sampling=Sampling(max_new_tokens=24), on_text=pieces.append
    )
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        eos_token_id=stop_tokens(model, tokenizer), pad_token_id=0,
    )[0, len(ids) :]  # fmt: skip
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(pieces) == answer
    assert "hello" not in answer


def test_the_turn_end_of_the_template_stops_the_answer(tokenizer: Any, model: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(stop_tokens(model, tokenizer)) == {tokenizer.eos_token_id, end}
    ids = render(tokenizer, [{"role": "user", "content": "hi"}])
    longest = generate(model, tokenizer, ids, sampling=Sampling(max_new_tokens=64))
    bias = torch.zeros(len(tokenizer))
    bias[end] = 1e4
    hook = model.lm_head.register_forward_hook(lambda m, args, out: out + bias)
    try:
        assert generate(model, tokenizer, ids, sampling=Sampling(max_new_tokens=64)) == ""
    finally:
        hook.remove()
    assert longest


def test_sampling_repeats_with_its_seed(tokenizer: Any, model: Any) -> None:
    ids = render(tokenizer, [{"role": "user", "content": "hi"}])

    def sample(seed: int) -> str:
        how = Sampling(max_new_tokens=32, temperature=1.0, seed=seed)
        return generate(model, tokenizer, ids, sampling=how)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_model_without_a_template_gets_the_plain_text(tokenizer: Any) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    ids = render(plain, [{"role": "user", "content": "abc"}])
    assert plain.decode(ids) == "abc"
