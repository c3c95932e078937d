"""Streaming: one tensor in memory, whole files or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nibble.errors import CheckpointError, ExportError
from nibble.weights import (
    Shape,
    check_free_space,
    open_weights,
    stream,
    write_safetensors_atomic,
    write_sharded,
)

NUM_TENSORS = 40
TENSOR_BYTES = 8 * 2**20

MEASURE = """
import sys
import torch
from torch import nn
torch.set_num_threads(1)
from nibble.weights import open_weights, stream

class Model(nn.Module):
    base_model_prefix = "model"
    def __init__(self):
        super().__init__()
        empty = [torch.empty(2048, 1024, device="meta") for _ in range(40)]
        self.rows = nn.ParameterList(nn.Parameter(tensor) for tensor in empty)

def status(word):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))

source = open_weights(sys.argv[1])
source.native = True
values = stream(source, Model())
# getrusage's maximum survives exec, and the imports' own peak would hide ours: start anew.
open("/proc/self/clear_refs", "w").write("5")
before, total, kept = status("VmRSS"), 0.0, []
for name, value in values:
    total += float(value[0, 0])
    if sys.argv[2] == "keep":
        kept.append(value)
    del value
print(status("VmHWM") - before, len(values), total, values.report.num_bytes)
"""


def measure(folder: Path, what: str) -> list[float]:
    """Growth of the peak in bytes, tensors, sum of first elements and bytes, in its own process."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), what],
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(word) for word in out.stdout.split()]


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
def test_peak_memory_is_a_tensor_not_a_model(tmp_path: Path) -> None:
    weight_map = {}
    for shard in range(4):
        name = f"model-{shard + 1:05}-of-00004.safetensors"
        part = {
            f"rows.{i}": torch.full((2048, 1024), float(i))
            for i in range(shard * 10, shard * 10 + 10)
        }
        save_file(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    growth, count, total, num_bytes = measure(tmp_path, "drop")
    assert count == NUM_TENSORS and total == sum(range(NUM_TENSORS))
    assert num_bytes == NUM_TENSORS * TENSOR_BYTES
    assert growth <= 2 * TENSOR_BYTES, f"{growth / TENSOR_BYTES:.1f} tensors"
    # The measure itself must see a model that is kept.
    assert measure(tmp_path, "keep")[0] >= 0.95 * NUM_TENSORS * TENSOR_BYTES


def test_every_type_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "f64": torch.randn(2).double(),
        "i64": torch.arange(4),
        "u8": torch.arange(9, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    for name, tensor in tensors.items():
        value = source.read(name)
        assert isinstance(value, Tensor) and value.dtype == tensor.dtype
        assert source.entries()[name].shape == tuple(tensor.shape)
        assert torch.equal(value, tensor)


def test_sharded_files_are_the_librarys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(10, 10).bfloat16(),
        "b": torch.randn(3),
        "c": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.0),
        "t": torch.randn(4, 6).t(),
    }
    shapes = {n: Shape(shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()}
    shuffled = reversed(list(tensors.items()))
    files = write_sharded(tmp_path, shapes, shuffled, max_shard_bytes=210)
    assert len(files) == 2 and {f.name for f in tmp_path.iterdir()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    together = load_file(files[0]) | load_file(files[1])
    assert set(together) == set(tensors)
    assert all(torch.equal(together[name], tensors[name]) for name in tensors)
    source = open_weights(tmp_path)
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    whole = write_sharded(tmp_path / "one", shapes, tensors.items())
    assert [file.name for file in whole] == ["model.safetensors"]
    write_safetensors_atomic(tmp_path / "x.safetensors", tensors, metadata={"step": "3"})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensors["t"])


def test_an_export_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    shapes = {n: Shape(shape=(4,), dtype=torch.float32) for n in ("a", "b")}
    with pytest.raises(ExportError, match="1 tensors never came, such as b"):
        write_sharded(tmp_path, shapes, [("a", torch.ones(4))])
    with pytest.raises(ExportError, match="announced as"):
        write_sharded(tmp_path, shapes, [("a", torch.ones(5))])
    with pytest.raises(ExportError, match="was not announced or came twice"):
        write_sharded(tmp_path, shapes, [("a", torch.ones(4)), ("a", torch.ones(4))])

    def broken() -> object:
        yield "a", torch.ones(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sharded(tmp_path, shapes, broken())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_safetensors_atomic(path, {"a": torch.ones(4)})
    with pytest.raises(KeyError):
        write_safetensors_atomic(path, {"a": torch.ones(4, dtype=torch.complex64)})
    assert torch.equal(load_file(path)["a"], torch.ones(4))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_full_disk_is_said_before_and_during(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing was written"):
        check_free_space(tmp_path / "not" / "yet", 2**60)
    # A limit on the size of files stands in for a disk that fills up while it is written.
    path = tmp_path / "state.safetensors"
    code = (
        "import signal, resource, sys, torch, pathlib\n"
        "from nibble.weights import write_safetensors_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "write_safetensors_atomic(pathlib.Path(sys.argv[1]), {'a': torch.ones(1 << 16)})\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "nibble.errors.CheckpointError" in out.stderr.strip().splitlines()[-1]
    assert "cannot be written" in out.stderr
    assert list(tmp_path.iterdir()) == []


def test_copies_go_to_every_position(tmp_path: Path) -> None:
    class Tiny(nn.Module):
        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False, device="meta") for _ in "ab")

    save_file(
        {"layers.0.weight": torch.zeros(2, 2), "layers.1.weight": torch.ones(2, 2)},
        tmp_path / "model.safetensors",
    )
    source = open_weights(tmp_path)
    source.native = True
    positions = {0: [0], 1: [1, 2]}

    def targets_of(name: str) -> list[str]:
        return [f"layers.{p}.weight" for p in positions[int(name.split(".")[1])]]

    seen = dict(stream(source, Tiny(), targets_of=targets_of))
    assert list(seen) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    assert seen["layers.2.weight"].sum() == 4
