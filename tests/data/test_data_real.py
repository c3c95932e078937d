"""Real files and real tokenizers, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nibble.data import Splits, prepare, show_row
from nibble.spec.config import Data, Source


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Any:
    """The 32,000-token tokenizer of Llama 2: metaspace, byte fallback, its own begin token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizers" / "llama2-tokenizer.json"),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
    )  # fmt: skip


def run(tokenizer: Any, path: Path, *, task: str = "causal-lm", **words: Any) -> Splits:
    source = {k: words.pop(k) for k in ("columns", "template", "num_rows") if k in words}
    data = Data(train=(Source(path=str(path), **source),), **words)
    return prepare(data, tokenizer, task=task, seed=0, can_pack=True)


def learnt(splits: Splits, index: int, tokenizer: Any) -> str:
    row = splits.train.row(index)
    return str(tokenizer.decode(row.ids[row.targets]))


def test_alpaca(shared_data: Path, llama2: Any) -> None:
    splits = run(llama2, shared_data / "instruct" / "alpaca_5000.json.xz", num_rows=200)
    assert splits.report.num_read == 200 and "format alpaca (found)" in splits.report.notes[0]
    for i in range(0, len(splits.train), 20):
        text = llama2.decode(splits.train.row(i).ids)
        assert text.startswith(("<s> Below is an instruction", "<s>Below is an instruction"))
        _, _, answer = text.partition("### Response:\n")
        assert learnt(splits, i, llama2).strip() == answer.strip() and answer.endswith("</s>")


def test_questions_and_answers(shared_data: Path, llama2: Any) -> None:
    splits = run(llama2, shared_data / "instruct" / "gsm8k_test.jsonl", num_rows=50)
    assert len(splits.train) == 50 and splits.train.source(0).endswith("gsm8k_test.jsonl:1")
    shown = show_row(splits.train, 0, tokenizer=llama2)
    assert "".join(text for text, _ in shown) == llama2.decode(splits.train.row(0).ids)
    assert [trained for _, trained in shown] == sorted(trained for _, trained in shown)


def test_a_template_over_dialogues(shared_data: Path, llama2: Any) -> None:
    splits = run(
        llama2,
        shared_data / "instruct" / "dialogsum.train.jsonl.xz",
        num_rows=64,
        columns={"completion": "summary"},
        template="Summarise:\n{dialogue}\nSummary: ",
        eval_rows=8,
        max_length=512,
    )
    assert splits.eval_records is not None
    records = list(splits.eval_records)
    assert len(records) == 8
    assert all(r.prompt.startswith("Summarise:\n#Person1#") and r.reference for r in records)


def test_a_korean_table(shared_data: Path, llama2: Any) -> None:
    splits = run(
        llama2,
        shared_data / "instruct" / "korean_chatbot.csv",
        num_rows=300,
        columns={"prompt": "Q", "completion": "A"},
    )
    assert learnt(splits, 0, llama2) == "하루가 또 가네요.</s>"


@pytest.mark.parametrize(
    ("task", "columns", "names", "num_rows"),
    [
        ("CoLA", {"text": "3", "label": "1"}, ("0", "1"), 1043),
        ("SST-2", {}, ("0", "1"), 872),
        ("MRPC", {}, ("0", "1"), 408),
        ("RTE", {}, ("entailment", "not_entailment"), 277),
        ("STS-B", {}, (), 1500),
    ],
)
def test_glue(
    shared_data: Path, llama2: Any, task: str, columns: Any, names: Any, num_rows: int
) -> None:
    path = shared_data / "glue" / task / "dev.tsv"
    splits = run(llama2, path, task="classification", columns=columns)
    assert splits.label_names == names and not splits.report.counts
    assert abs(len(splits.train) - num_rows) <= 1


def test_documents_of_a_book_and_of_wikipedia(shared_data: Path, llama2: Any) -> None:
    wiki = shared_data / "pretrain" / "wiki_vital_summaries.jsonl.xz"
    splits = run(llama2, wiki, num_rows=50, packing=True, max_length=64)
    rows = splits.train
    ends = [int(rows.row(i).ids[-1]) == llama2.eos_token_id for i in range(len(rows))]
    assert sum(ends) == 50 and int(rows.lengths.max()) == 64
    model = shared_data / "models" / "stories260K-hf"
    from transformers import AutoTokenizer

    stories = AutoTokenizer.from_pretrained(model)
    text = run(stories, wiki, num_rows=5, max_length=32).train
    assert int(text.ids[0]) == stories.bos_token_id
