"""Real instructions as packed rows, the same ones for nibble and for every peer.

    python bench/packed_rows.py --data alpaca.json.xz --tokenizer tokenizer.json --out rows.npz

Each example (instruction, input, output) is one document; nibble's best-fit packer lays documents
into rows of --length tokens. The file holds ids, positions (from 0 in each document), labels
(every token of a document but its first is a target; padding is not) and the lengths of documents,
so that reading it needs numpy alone.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Some packed rows: int64 [rows, length] each, and the lengths of the documents of each row,
    padding being the last one where there is any. `labels` are not shifted."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    doc_lengths: tuple[tuple[int, ...], ...]
    num_tokens: int


def micro_batches(path: str, *, rows: int) -> Iterator[PackedRows]:
    """Batches of so many rows, from the beginning again when they end."""
    with np.load(path) as file:
        ids, padding = file["ids"].astype(np.int64), file["padding"]
        flat, counts = file["doc_lengths"], file["num_docs"]
    lengths = np.split(flat, np.cumsum(counts)[:-1])
    length = ids.shape[1]
    while True:
        for begin in range(0, len(ids) - rows + 1, rows):
            some = range(begin, begin + rows)
            docs = [[int(n) for n in lengths[i]] for i in some]
            positions = np.stack([np.concatenate([np.arange(n) for n in one]) for one in docs])
            labels = np.where(positions == 0, IGNORE, ids[begin : begin + rows])
            for row, i in enumerate(some):
                labels[row, length - int(padding[i]) :] = IGNORE
            yield PackedRows(
                ids=ids[begin : begin + rows],
                positions=positions,
                labels=labels,
                doc_lengths=tuple(tuple(one) for one in docs),
                num_tokens=rows * length - int(padding[begin : begin + rows].sum()),
            )


def tokens_a_row(path: str) -> float:
    """Mean of the tokens of a row that are not padding."""
    with np.load(path) as file:
        length = int(file["ids"].shape[1])
        return length - float(file["padding"].mean())


def prepare(data: Path, tokenizer: Path, out: Path, *, length: int) -> dict[str, Any]:
    """Tokenise, pack and write; what was made."""
    from tokenizers import Tokenizer

    from nibble.data.pack import plan_bins

    packed = data.read_bytes()
    examples = json.loads(lzma.decompress(packed) if data.suffix == ".xz" else packed)
    encode = Tokenizer.from_file(str(tokenizer)).encode_batch
    texts = [_text(example) for example in examples]
    documents = [np.asarray([*made.ids, 2][:length], np.uint16) for made in encode(texts)]
    bins = plan_bins([len(document) for document in documents], capacity=length, seed=0)
    ids = np.zeros((len(bins), length), np.uint16)
    padding = np.zeros(len(bins), np.int32)
    lengths: list[int] = []
    counts = []
    for number in range(len(bins)):
        members = [documents[i] for i in bins[number]]
        row = np.concatenate(members)
        ids[number, : len(row)] = row
        padding[number] = length - len(row)
        own = [len(one) for one in members] + ([length - len(row)] if len(row) < length else [])
        lengths += own
        counts.append(len(own))
    np.savez_compressed(
        out, ids=ids, padding=padding, doc_lengths=np.asarray(lengths), num_docs=np.asarray(counts)
    )
    return {
        "documents": len(documents),
        "rows": len(bins),
        "tokens": int(ids.size - padding.sum()),
        "padding_share": round(float(padding.sum() / ids.size), 4),
        "documents_a_row": round(len(documents) / len(bins), 1),
        "bytes": out.stat().st_size,
    }


def _text(example: dict[str, str]) -> str:
    given = f"\n\nInput: {example['input']}" if example.get("input") else ""
    return f"Instruction: {example['instruction']}{given}\n\nResponse: {example['output']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    told = prepare(options.data, options.tokenizer, options.out, length=options.length)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
