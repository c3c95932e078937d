"""Files to records: every kind, every compression, and what is broken is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nibble.data.hub import HubSet, open_source
from nibble.data.sources import BadRecord, LocalFile, Record
from nibble.errors import ConfigError, DataError
from nibble.spec.config import Source

Write = Callable[..., str]
ROWS = [{"text": "Grüße", "n": "1"}, {"text": "two\nlines", "n": "2"}]


def read(path: str, **words: Any) -> list[Record | BadRecord]:
    return [
        record
        for file in open_source(Source(path=path, **words), max_length=64)
        for record in file.records()
    ]


def contents(name: str) -> bytes:
    match Path(name).suffix:
        case ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        case ".json":
            return json.dumps(ROWS, ensure_ascii=False).encode()
        case ".csv":
            return 'text,n\nGrüße,1\n"two\nlines",2\n'.encode()
        case ".tsv":
            return "text\tn\nGrüße\t1\ntwo\\nlines\t2\n".encode().replace(b"\\n", b" ")
    return "Grüße\n<|endofdoc|>\ntwo\nlines\n".encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("compressed", ["", ".xz", ".gz", ".bz2"])
def test_the_same_rows_from_every_kind_of_file(write: Write, name: str, compressed: str) -> None:
    pack: Any = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}
    records = read(write(name + compressed, pack[compressed](contents(name))))
    assert all(isinstance(record, Record) for record in records)
    texts = [record.values["text"] for record in records if isinstance(record, Record)]
    assert [text.replace("\n", " ") for text in texts] == ["Grüße", "two lines"]
    numbers = [record.line for record in records]
    assert numbers == (
        [1, 3] if name == "a.txt" else [2, 3] if name[-3:] in ("csv", "tsv") else [1, 2]
    )


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [record.values for record in read(str(path)) if isinstance(record, Record)] == ROWS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
        read(str(path))


def test_parquet_without_pyarrow_names_the_extra(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"nibble\[data\]"):
        read(path)


def test_json_may_be_wrapped_or_be_lines(write: Write) -> None:
    wrapped = read(write("a.json", json.dumps({"version": "v0.1", "data": ROWS})))
    lines = read(write("b.json", "".join(json.dumps(row) + "\n" for row in ROWS)))
    assert [r.values for r in wrapped if isinstance(r, Record)] == ROWS
    assert [r.values for r in lines if isinstance(r, Record)] == ROWS
    with pytest.raises(DataError, match=r'c\.json holds one JSON dict; a list or \{"data"'):
        read(write("c.json", '{"rows": 3}'))
    with pytest.raises(DataError, match=r"d\.json:2 is not JSON"):
        read(write("d.json", '[{"a": 1},\n {"a": }]'))


def test_broken_rows_are_named_and_the_others_read(write: Write) -> None:
    good = json.dumps({"text": "fine"}).encode()
    path = write("a.jsonl", b"\n".join([good, b'{"text": ', b"\xff\xfe{}", b"[1]", b"", good]))
    records = read(path)
    assert [type(record) for record in records] == [Record, BadRecord, BadRecord, BadRecord, Record]
    assert [record.line for record in records] == [1, 2, 3, 4, 6]
    details = [record.detail for record in records if isinstance(record, BadRecord)]
    assert details[0].startswith("not JSON")
    assert details[1:] == ["not UTF-8", "a JSON list where an object is wanted"]


def test_broken_table_rows_are_named(write: Write) -> None:
    path = write("a.csv", b'a,b\n1,2\n1\n"x\ny",2\n\xff,2\n3,4\n')
    bad = {r.line: r.detail for r in read(path) if isinstance(r, BadRecord)}
    assert bad == {3: "1 columns where 2 are wanted", 6: "not UTF-8"}
    assert [r.line for r in read(path) if isinstance(r, Record)] == [2, 4, 7]


def test_tsv_takes_quotes_literally_and_drops_a_byte_order_mark(write: Write) -> None:
    path = write("a.tsv", b'\xef\xbb\xbfQuality\t#1 String\n1\t" He said so .\n0\tno "\n')
    values = [record.values for record in read(path) if isinstance(record, Record)]
    assert values == [
        {"Quality": "1", "#1 String": '" He said so .'},
        {"Quality": "0", "#1 String": 'no "'},
    ]


def test_a_table_without_a_header_is_read_by_numbers(write: Write) -> None:
    path = write("cola.tsv", "gj04\t1\t\tIt is.\ngj04\t0\t*\tIt are.\n")
    records = read(path, columns={"text": "3", "label": "1"})
    assert [r.values["3"] for r in records if isinstance(r, Record)] == ["It is.", "It are."]


def test_documents_of_a_text_file(write: Write) -> None:
    path = write("a.txt", "one\n\nstill one\n<|endofdoc|>\n not <|endofdoc|> here\n<|endofdoc|>\n")
    records = read(path)
    assert [(r.values["text"], r.line) for r in records if isinstance(r, Record)] == [
        ("one\n\nstill one", 1),
        (" not <|endofdoc|> here", 5),
    ]


def test_a_folder_is_its_files_by_name(write: Write, tmp_path: Path) -> None:
    write("b.jsonl", [{"text": "b"}])
    write("a.txt.gz", gzip.compress(b"a"))
    write("notes.md", "no data")
    names = [Path(file.name).name for file in open_source(Source(path=str(tmp_path)), max_length=8)]
    assert names == ["a.txt.gz", "b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no data file \(one of \.jsonl"):
        read(str(tmp_path / "empty"))


def test_a_missing_file_names_its_neighbours(write: Write, tmp_path: Path) -> None:
    write("alpaca.jsonl", [{}])
    with pytest.raises(
        DataError, match=r"alpaka\.jsonl does not exist: did you mean alpaca\.jsonl"
    ):
        read(str(tmp_path / "alpaka.jsonl"))
    with pytest.raises(DataError, match=r"does not exist"):
        read(str(tmp_path / "nowhere" / "rows.jsonl"))
    with pytest.raises(DataError, match=r"notes\.md is not a data file"):
        read(write("notes.md", "x"))


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2"])
def test_a_file_cut_short_is_refused_by_name(write: Write, suffix: str) -> None:
    pack: Any = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}
    lines = "".join(json.dumps({"text": f"row {i * i}"}) + "\n" for i in range(4000)).encode()
    whole = pack[suffix](lines)
    with pytest.raises(DataError, match=r"cannot be read to its end"):
        read(write("a.jsonl" + suffix, whole[: len(whole) // 2]))


def test_hub_words_on_a_local_file_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="split belongs to hub data sets"):
        read(write("a.jsonl", [{}]), split="train")


class Hub:
    """Stands for the datasets library."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.asked: dict[str, Any] = {}

    def load_dataset(self, path: str, **words: Any) -> Any:
        self.asked = {"path": path, **words}
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_hub_set_is_streamed_when_rows_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([{"text": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (file,) = open_source(Source(path="owner/name", name="en", num_rows=5), max_length=8)
    assert list(file.records()) == [Record({"text": "a"}, 1)]
    assert hub.asked == {"path": "owner/name", "name": "en", "split": "train", "streaming": True}
    assert file.name == "owner/name/en[train]" and file.digest() is None


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Hub(ConnectionError("no route\nto the hub")))
    (file,) = open_source(Source(path="owner/name"), max_length=8)
    with pytest.raises(DataError, match=r"neither a file here nor a hub data set") as caught:
        list(file.records())
    assert "\n" not in str(caught.value) and "no route" in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"nibble\[data\]"):
        list(HubSet(source=Source(path="owner/name")).records())


def test_the_real_library_reads_a_set_from_disk(tmp_path: Path, write: Write) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    hub = HubSet(source=Source(path="owner/name"), _loaded=rows)
    assert [r.values["text"] for r in hub.records() if isinstance(r, Record)] == ["a", "b"]
    assert isinstance(hub.digest(), str)


def test_dummy_rows_fill_any_length() -> None:
    records = read("builtin:dummy", num_rows=3)
    assert len(records) == 3
    assert all(isinstance(r, Record) and len(r.values["text"].split()) > 64 for r in records)
    with pytest.raises(DataError, match="the built-in source is builtin:dummy"):
        read("builtin:dumy")


def test_the_digest_follows_the_content(write: Write) -> None:
    first = LocalFile(path=Path(write("a.jsonl", ROWS))).digest()
    same = LocalFile(path=Path(write("b.jsonl", ROWS))).digest()
    other = LocalFile(path=Path(write("c.jsonl", ROWS[:1]))).digest()
    assert first == same != other
