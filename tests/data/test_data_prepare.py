"""The data section as a whole: splits, reports, refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chat_tokenizers import bert_tokenizer

from nibble.data import Loader, Splits, prepare, show_row
from nibble.data.labels import label_names, label_tensor
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Data, Source

Write = Callable[..., str]
Tokenizers = Callable[..., Any]
PAIRS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(10)]


def run(tokenizer: Any, path: str, *, task: str = "causal-lm", **words: Any) -> Splits:
    source = {k: words.pop(k) for k in ("format", "columns", "template") if k in words}
    call = {k: words.pop(k) for k in ("seed", "can_pack", "num_labels", "progress") if k in words}
    data = Data(train=(Source(path=path, **source),), **words)
    return prepare(data, tokenizer, task=task, **{"seed": 0, "can_pack": True, **call})


def test_a_plain_completion_ends_with_the_end_token(tokenizers: Tokenizers, write: Write) -> None:
    tokenizer = tokenizers(bos=True)
    splits = run(tokenizer, write("a.jsonl", PAIRS[:2]))
    shown = show_row(splits.train, 0, tokenizer=tokenizer)
    assert "".join(text for text, _ in shown) == "<s>Question 0?Answer 0.</s>"
    assert "".join(text for text, trained in shown if trained) == "Answer 0.</s>"
    assert splits.train.source(1).endswith("a.jsonl:2")
    assert splits.stop_ids == (tokenizer.eos_token_id,)


def test_alpaca_takes_its_own_prompt_only_without_a_template(
    tokenizers: Tokenizers, write: Write
) -> None:
    path = write("a.jsonl", [{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    splits = run(tokenizers(), path)
    plain = splits.train
    assert tokenizers().decode(plain.ids).startswith("Below is an instruction that describes")
    # A question to the trained model is put in the same words, without an input.
    assert splits.question_prompt is not None
    assert splits.question_prompt.endswith("### Instruction:\n{question}\n\n### Response:\n")
    assert run(tokenizers("chatml"), path).question_prompt is None
    assert run(tokenizers(), write("b.jsonl", PAIRS)).question_prompt is None
    chat = run(tokenizers("chatml"), path).train
    assert tokenizers("chatml").decode(chat.ids) == (
        "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )


def test_every_row_that_falls_out_is_counted_and_named(
    tokenizers: Tokenizers, write: Write
) -> None:
    good = '{"prompt": "a", "completion": "b"}'
    long_prompt = '{"prompt": "%s", "completion": "b"}' % ("word " * 200)
    long_answer = '{"prompt": "a", "completion": "%s"}' % ("word " * 200)
    lines = [good, "{", '{"prompt": "a"}', '{"prompt": "a", "completion": " "}', long_prompt]
    path = write("a.jsonl", "\n".join([*lines, long_answer]) + "\n")
    report = run(tokenizers(), path, max_length=32).report
    assert dict(report.counts) == {"malformed": 2, "empty": 1, "no target": 1, "truncated": 1}
    assert (report.num_rows, report.num_read, report.num_dropped) == (2, 6, 4)
    assert [text.partition(": ")[0][-9:] for text in report.examples["malformed"]] == [
        "a.jsonl:2",
        "a.jsonl:3",
    ]
    assert "a.jsonl:5" in report.examples["no target"][0]
    assert report.longest > 200
    text = "\n".join(report.lines())
    assert "2 rows of 6 read" in text and "2 malformed (dropped)" in text
    assert "1 truncated (learnt in part)" in text
    dropped = run(tokenizers(), path, max_length=32, too_long="drop").report
    assert dropped.counts["too long"] == 2 and dropped.num_rows == 1
    with pytest.raises(DataError, match=r"a\.jsonl:5 has \d+ tokens, more than max_length 32"):
        run(tokenizers(), path, max_length=32, too_long="error")


@pytest.mark.parametrize("name", [None, "chatml", "glm"])
def test_a_truncated_answer_learns_no_stop_token(
    tokenizers: Tokenizers, write: Write, name: str | None
) -> None:
    """A model that is shown an end in mid-sentence learns to stop there."""
    tokenizer = tokenizers(name)
    path = write("a.jsonl", [{"prompt": "a", "completion": "word " * 200}])
    rows = run(tokenizer, path, max_length=40).train
    assert len(rows.ids) == 40 and bool(rows.targets[-1])
    assert not set(rows.ids[rows.targets].tolist()) & set(tokenizer.all_special_ids)


def test_nothing_to_train_is_refused(tokenizers: Tokenizers, write: Write) -> None:
    """Others run on with every label at -100 and report a loss of 0."""
    masked = write("a.jsonl", [{"prompt": "word " * 50, "completion": "b"}] * 3)
    with pytest.raises(
        DataError, match=r"nothing in data\.train can be trained on \(3 no target\)"
    ):
        run(tokenizers(), masked, max_length=16)
    refused = write("b.jsonl", [{"messages": [{"role": "system", "content": "x"}]}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: no message of the assistant"):
        run(tokenizers("gemma"), refused)
    with pytest.raises(DataError, match=r"c\.jsonl is empty"):
        run(tokenizers(), write("c.jsonl", "\n\n"))
    with pytest.raises(
        DataError, match=r"no row of .*d\.jsonl can be read; the first: .*:1: not J"
    ):
        run(tokenizers(), write("d.jsonl", "{\n" * 100))
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        prepare(Data(), tokenizers(), task="causal-lm", seed=0, can_pack=True)


def test_documents_are_cut_only_to_be_packed(tokenizers: Tokenizers, write: Write) -> None:
    tokenizer = tokenizers()
    text = "The quick brown fox jumps over the lazy dog. " * 30
    path = write("a.txt", text)
    whole = [*tokenizer(text.strip("\n"))["input_ids"], tokenizer.eos_token_id]
    packed = run(tokenizer, path, max_length=64, packing=True)
    assert packed.train.ids.tolist() == whole
    assert len(packed.train) == -(-len(whole) // 64) and not packed.report.counts
    assert packed.train.targets.tolist() == [i % 64 != 0 for i in range(len(whole))]
    cut = run(tokenizer, path, max_length=64)
    assert cut.train.ids.tolist() == whole[:64] and cut.report.counts["truncated"] == 1


def test_held_out_rows_are_chosen_by_seed_and_never_learnt(
    tokenizers: Tokenizers, write: Write
) -> None:
    path = write("a.jsonl", PAIRS)
    splits = run(tokenizers(), path, eval_rows=3)
    assert splits.eval is not None and (len(splits.train), len(splits.eval)) == (7, 3)
    train, held = (
        {rows.source(i) for i in range(len(rows))} for rows in (splits.train, splits.eval)
    )
    assert not train & held and len(train | held) == 10
    again = run(tokenizers(), path, eval_rows=3).eval
    other = run(tokenizers(), path, eval_rows=3, seed=1).eval
    assert again is not None and other is not None
    assert {again.source(i) for i in range(3)} == held != {other.source(i) for i in range(3)}
    assert splits.eval_report is not None and splits.eval_report.num_rows == 3
    with pytest.raises(DataError, match="holds out 10 rows of 10"):
        run(tokenizers(), path, eval_rows=10)


@pytest.mark.parametrize("name", [None, "gemma"])
def test_held_out_rows_as_text(tokenizers: Tokenizers, write: Write, name: str | None) -> None:
    splits = run(tokenizers(name), write("a.jsonl", PAIRS), eval_rows=3)
    assert splits.eval is not None and splits.eval_records is not None
    records = list(splits.eval_records)
    assert [record.source for record in records] == [splits.eval.source(i) for i in range(3)]
    for i, record in enumerate(records):
        text = tokenizers(name).decode(splits.eval.row(i).ids)
        assert text.startswith(record.prompt + record.reference)
        assert record.special_tokens == (name is None)


def test_words_that_contradict_each_other(tokenizers: Tokenizers, write: Write) -> None:
    path = write("a.jsonl", PAIRS)
    with pytest.raises(ConfigError, match="cannot keep the documents of a row apart"):
        run(tokenizers(), path, packing=True, can_pack=False)
    with pytest.raises(ConfigError, match=r"data\.system needs a chat template"):
        run(tokenizers(), path, system="x")
    with pytest.raises(ConfigError, match="both given"):
        run(tokenizers(), path, eval=(Source(path=path),), eval_rows=2)
    chats = write("b.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        run(tokenizers(), chats)


def test_a_template_file_replaces_the_tokenizers(tokenizers: Tokenizers, write: Write) -> None:
    template = write("t.jinja", "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    rows = run(tokenizers("chatml"), write("a.jsonl", PAIRS[:1]), chat_template=template).train
    assert tokenizers("chatml").decode(rows.ids) == "Question 0?</s>Answer 0.</s>"


def test_several_sources_are_one_after_the_other(tokenizers: Tokenizers, write: Write) -> None:
    data = Data(
        train=(
            Source(path=write("a.jsonl", PAIRS[:2])),
            Source(path=write("b.txt", "Hello world")),
        ),
        eval=(Source(path=write("c.jsonl", PAIRS[5:]), num_rows=2),),
    )
    splits = prepare(data, tokenizers(), task="causal-lm", seed=0, can_pack=False)
    names = [splits.train.source(i).rpartition("/")[2] for i in range(3)]
    assert names == ["a.jsonl:1", "a.jsonl:2", "b.txt:1"] and len(splits.train) == 3
    assert tokenizers().decode(splits.train.row(2).ids) == "Hello world</s>"
    assert splits.eval is not None and len(splits.eval) == 2
    thawed = pickle.loads(pickle.dumps(splits.train))
    assert torch.equal(thawed.ids, splits.train.ids) and thawed.source(2) == splits.train.source(2)


def test_progress_is_told(tokenizers: Tokenizers, write: Write) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = write("a.jsonl", PAIRS * 120)
    run(tokenizers(), path, progress=lambda *words: seen.append(words))
    assert [done for _, done, _ in seen] == [512, 1024, 1200] and seen[-1][2] == 1200


def test_labels_are_a_function_of_their_set() -> None:
    assert label_names(["1", "0", "0"]) == label_names([0, 1]) == ("0", "1")
    assert label_names([1, 2, 3]) == ("1", "2", "3")
    assert label_names([0, 1, 3]) == ("0", "1", "2", "3")
    assert label_names(["-1", "1"]) == ("-1", "1")
    words = ["not_entailment", "entailment", "entailment"]
    names = label_names(words)
    assert names == ("entailment", "not_entailment")
    assert label_tensor(words, names).tolist() == [1, 0, 0]
    assert label_names(["5.000", "3"]) == ()
    assert label_tensor(["5.000", "3"], ()).tolist() == [5, 3]


def test_classification_rows_and_batches(tokenizers: Tokenizers, write: Write) -> None:
    tokenizer = tokenizers(bos=True)
    rows = [
        {"sentence1": "Hello", "sentence2": "world", "label": "yes"},
        {"sentence1": "The quick brown fox " * 20, "sentence2": "no", "label": "no"},
    ]
    path = write("a.jsonl", rows)
    splits = run(tokenizer, path, task="classification", max_length=24)
    assert splits.label_names == ("no", "yes") and splits.num_labels == 2
    assert splits.report.counts == {"truncated": 1} and splits.train.num_targets == 2
    loader = Loader(splits.train, micro_batch_size=2, accumulation=1, seed=0, shuffle=False)
    (batch,) = next(loader)
    assert batch.labels.tolist() == [1, 0] and batch.labels.dtype == torch.int64
    assert batch.attention_mask is not None and batch.attention_mask.sum(1).tolist()[1] == 24
    reference = tokenizer(
        [row["sentence1"] for row in rows], [row["sentence2"] for row in rows],
        truncation=True, max_length=24, padding=True, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(batch.input_ids, reference["input_ids"])
    assert torch.equal(batch.attention_mask, reference["attention_mask"])
    numbers = write("b.jsonl", [{"text": "Hello", "label": 0.5}, {"text": "you", "label": 1}])
    splits = run(tokenizer, numbers, task="classification")
    assert splits.num_labels == 1
    (batch,) = next(Loader(splits.train, micro_batch_size=2, accumulation=1, seed=0, shuffle=False))
    assert batch.labels.tolist() == [0.5, 1.0] and batch.labels.dtype == torch.float32


def test_segments_of_a_bert_pair_reach_the_batch(write: Write) -> None:
    tokenizer = bert_tokenizer()
    path = write(
        "a.jsonl", [{"text": "hello", "text_pair": "two three", "label": i} for i in (0, 1)]
    )
    splits = run(tokenizer, path, task="classification")
    (batch,) = next(Loader(splits.train, micro_batch_size=2, accumulation=1, seed=0))
    reference = tokenizer(["hello"] * 2, ["two three"] * 2, return_tensors="pt")
    assert batch.token_type_ids is not None and int(batch.token_type_ids.max()) == 1
    assert torch.equal(batch.token_type_ids, reference["token_type_ids"])
    alone = write("b.jsonl", [{"text": "hello", "label": i} for i in (0, 1)])
    data = Data(train=(Source(path=alone), Source(path=path)))
    both = prepare(data, tokenizer, task="classification", seed=0, can_pack=False).train
    assert both.row(0).type_ids is not None and both.row(0).type_ids.tolist() == [0, 0, 0]
    assert run(tokenizer, alone, task="classification").train.type_ids is None


def test_labels_that_do_not_fit_the_head(tokenizers: Tokenizers, write: Write) -> None:
    rows = [{"text": "Hello", "label": label} for label in ("a", "b", "c")]
    with pytest.raises(DataError, match=r"3 classes, model\.num_labels is 2"):
        run(tokenizers(), write("a.jsonl", rows), task="classification", num_labels=2)
    numbers = write("b.jsonl", [{"text": "Hello", "label": i} for i in (0, 1)])
    wide = run(tokenizers(), numbers, task="classification", num_labels=5)
    assert wide.num_labels == 5
    assert run(tokenizers(), numbers, task="classification", num_labels=1).num_labels == 1
