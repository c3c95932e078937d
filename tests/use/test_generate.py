"""Streaming text: complete characters only, never the prompt, the same tokens as transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_models as small
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nibble.use.generate import Sampling, Streamer, generate, generate_batch, render, stop_tokens

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


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "bloom", "mixtral"])
def test_answers_made_together_are_those_made_alone(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small.save_model(kind, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, small.VOCAB, (length,), generator=generator).tolist()
        for length in (3, 17, 9, 1)
    ]
    how = Sampling(max_new_tokens=12)
    alone = [generate(model, tokenizer, ids, sampling=how) for ids in prompts]
    # Tokens that end some answers early and not others.
    longest = max((tokenizer(answer)["input_ids"] for answer in alone), key=len)
    ends = Sampling(max_new_tokens=12, stop_ids=(longest[len(longest) // 2],))
    cut = [generate(model, tokenizer, ids, sampling=ends) for ids in prompts]
    assert generate_batch(model, tokenizer, prompts, sampling=how) == alone
    assert generate_batch(model, tokenizer, prompts, sampling=ends) == cut
    assert cut != alone and len(set(alone)) > 1 and model.training
