"""What a person can get wrong: one line, an exit code, and nothing half done left behind."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Nibble, save_tokenizer, write_rows

Make = Callable[[Path, Path], list[str]]


def copied(world: Path, here: Path, *leave_out: str) -> Path:
    folder = here / "model"
    shutil.copytree(world / "base", folder, ignore=shutil.ignore_patterns(*leave_out))
    return folder


def train(world: Path, *words: str) -> list[str]:
    return ["train", str(world / "recipe.yaml"), *words]


def truncated(world: Path, here: Path) -> list[str]:
    file = copied(world, here) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return train(world, f"model.path={here / 'model'}")


def corrupt_header(world: Path, here: Path) -> list[str]:
    file = copied(world, here) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8:40] = b"\xff" * 32
    file.write_bytes(raw)
    return train(world, f"model.path={here / 'model'}")


def wrong_dtype(world: Path, here: Path) -> list[str]:
    from safetensors.torch import load_file, save_file

    file = copied(world, here) / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    return train(world, f"model.path={here / 'model'}")


def with_config(**changes: Any) -> Make:
    def make(world: Path, here: Path) -> list[str]:
        file = copied(world, here) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return train(world, f"model.path={here / 'model'}")

    return make


def not_json(world: Path, here: Path) -> list[str]:
    (copied(world, here) / "config.json").write_text('{"model_type": "llama",')
    return train(world, f"model.path={here / 'model'}")


def pickle_only(world: Path, here: Path) -> list[str]:
    folder = copied(world, here, "*.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return train(world, f"model.path={folder}")


def foreign_tokenizer(world: Path, here: Path) -> list[str]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"x{i}": i for i in range(99)}
    raw = Tokenizer(models.WordLevel(words, unk_token="x0"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="x0").save_pretrained(here / "tok")
    return train(world, f"model.tokenizer={here / 'tok'}")


def no_tokenizer(world: Path, here: Path) -> list[str]:
    folder = copied(world, here, "tokenizer*", "special_tokens*", "*.jinja")
    return train(world, f"model.path={folder}")


def data_file(name: str, text: str, *more: str) -> Make:
    def make(world: Path, here: Path) -> list[str]:
        (here / name).write_text(text)
        return train(world, f"data.train={here / name}", *more)

    return make


def words(*given: str) -> Make:
    return lambda world, here: train(world, *given)


def command(*given: str) -> Make:
    return lambda world, here: [
        word.replace("WORLD", str(world)).replace("HERE", str(here)) for word in given
    ]


def positions(world: Path, here: Path) -> list[str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(here / "gpt2")
    save_tokenizer(here / "gpt2")
    row = {"prompt": "w1 " * 30, "completion": "w2"}
    write_rows(here / "long.jsonl", [row] * 3)
    return train(
        world, f"model.path={here / 'gpt2'}", f"data.train={here / 'long.jsonl'}",
        "data.eval_rows=1", "data.max_length=64",
    )  # fmt: skip


def run_without_checkpoint(world: Path, here: Path) -> list[str]:
    (here / "run").mkdir()
    (here / "run" / "recipe.yaml").write_text((world / "recipe.yaml").read_text())
    return ["chat", str(here / "run"), "--prompt", "hi"]


def adapter(text: str) -> Make:
    def make(world: Path, here: Path) -> list[str]:
        (here / "adapter").mkdir()
        (here / "adapter" / "adapter_config.json").write_text(text)
        (here / "adapter" / "adapter_model.safetensors").write_bytes(b"")
        return ["chat", str(here / "adapter"), "--prompt", "hi"]

    return make


def folder_is_a_file(world: Path, here: Path) -> list[str]:
    (here / "taken").write_text("mine")
    return ["train", str(world / "recipe.yaml"), f"output_dir={here / 'taken'}"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Words that cannot be meant, the exit code, and what the line must name."""

    make: Make
    code: int
    says: tuple[str, ...]
    before_weights: bool = True


CASES: dict[str, Case] = {
    "no such recipe": Case(make=command("train", "HERE/nothing.yaml"), code=2,
        says=("nothing.yaml is neither a file nor a built-in recipe", "built-in ones")),
    "no such model": Case(make=words("model.path=./nowhere"), code=1,
        says=("./nowhere does not exist", "give a folder, a .gguf file or a hub id")),
    "no such hub model": Case(make=words("model.path=nobody/nothing"), code=1,
        says=("nobody/nothing", "cannot be fetched", "HF_HUB_OFFLINE")),
    "no such data": Case(make=words("data.train=missing.jsonl"), code=1,
        says=("missing.jsonl",)),
    "truncated weights": Case(make=truncated, code=1,
        says=("model.safetensors",)),
    "corrupt header": Case(make=corrupt_header, code=1, says=("model.safetensors",)),
    "wrong dtype": Case(make=wrong_dtype, code=1,
        says=("up_proj.weight is stored as int32", "float32, float16 or bfloat16")),
    "unknown family": Case(make=with_config(model_type="lama"), code=1,
        says=("family 'lama'", "nearest: llama", "model_type")),
    "config of another model": Case(make=with_config(hidden_size=32), code=1,
        says=("config.json and the weights do not belong together",)),
    "config is not JSON": Case(make=not_json, code=1, says=("config.json", "fetch it again")),
    "pickle only": Case(make=pickle_only, code=1,
        says=("pytorch_model.bin", "never loads pickle", "save_pretrained")),
    "tokenizer of another model": Case(make=foreign_tokenizer, code=1,
        says=("ids up to 98", "52 embedding rows", "model.tokenizer")),
    "no tokenizer": Case(make=no_tokenizer, code=1,
        says=("has no tokenizer", "set model.tokenizer")),
    "empty data": Case(make=data_file("empty.jsonl", ""), code=1, says=("empty.jsonl is empty",)),
    "malformed rows only": Case(make=data_file("bad.jsonl", "{not json\n{nor this\n"), code=1,
        says=("no row of", "bad.jsonl:1",)),
    "rows without an answer": Case(
        make=data_file("noanswer.jsonl", '{"prompt": "w1", "completion": ""}\n' * 3,
                       "data.eval_rows=1"), code=1,
        says=("nothing in data.train can be trained on", "noanswer.jsonl:1")),
    "unknown columns": Case(make=data_file("cols.jsonl", '{"left": "w1", "right": "w2"}\n'),
        code=1, says=("cols.jsonl", "left, right")),
    "more held out than there is": Case(make=words("data.eval_rows=48"), code=1,
        says=("holds out 48 rows of 48",)),
    "no GPU": Case(make=words("place.device=cuda"), code=1,
        says=("place.device=cuda", "use place.device=cpu or auto")),
    "unknown key": Case(make=words("train.micro_bach_size=4"), code=2,
        says=("train.micro_bach_size", "train.micro_batch_size")),
    "wrong type": Case(make=words("train.max_steps=many"), code=2,
        says=("train.max_steps=many is not a whole number",)),
    "unknown value": Case(make=words("quant.format=nf3"), code=2,
        says=("quant.format=nf3 is not one of", "nf4")),
    "contradiction": Case(make=words("adapter.kind=none"), code=2,
        says=("quant.format=nf4 with adapter.kind=none", "choose an adapter")),
    "no effect": Case(make=words("quant.bits=3"), code=2,
        says=("quant.bits=3 has no effect", "quant.format=hqq")),
    "stray word": Case(make=words("fast"), code=2, says=("'fast' is not an override",)),
    "unknown target": Case(make=words("adapter.targets=[q_prj]"), code=2,
        says=("q_prj", "q_proj")),
    "a warm-up longer than the run": Case(make=words("optim.warmup_steps=50"), code=2,
        says=("warm-up of 50 steps is longer than the run of 3", "shorten the warm-up")),
    "rows beyond the positions": Case(make=positions, code=2,
        says=("a row of", "gpt2 has 16 positions", "set data.max_length=16")),
    "output is a file": Case(make=folder_is_a_file, code=1,
        says=("taken cannot be a run folder", "choose another")),
    "resume of nothing": Case(make=lambda world, here: train(
        world, f"output_dir={here / 'none'}", "--resume"), code=1,
        says=("holds no run to resume", "leave out --resume")),
    "a run without checkpoint": Case(make=run_without_checkpoint, code=1,
        says=("has no checkpoint yet", "--base")),
    "export of a model": Case(make=command("export", "WORLD/base"), code=2,
        says=("only a run folder can be exported",)),
    "adapter is not JSON": Case(make=adapter("{"), code=1,
        says=("adapter_config.json is not readable JSON",)),
    "adapter of another method": Case(make=adapter('{"peft_type": "IA3"}'), code=1,
        says=("peft_type is IA3", "only LORA")),
    "chat with nothing": Case(make=command("chat", "./nowhere"), code=1,
        says=("./nowhere does not exist",)),
    "eval of no text": Case(make=command("eval", "WORLD/base", "--text", "HERE/no.txt"), code=1,
        says=("no.txt", "cannot be read")),
    "eval of nothing": Case(make=command("eval", "WORLD/base"), code=2,
        says=("give --text FILE or --data SET",)),
    "eval of two things": Case(
        make=command("eval", "WORLD/base", "--text", "a", "--data", "b"), code=2,
        says=("--text and --data are two questions",)),
    "eval beyond the context": Case(
        make=command("eval", "WORLD/base", "--text", "WORLD/text.txt", "--context-length", "99"),
        code=2, says=("--context-length 99", "the model has 64 positions")),
    "eval on a GPU": Case(
        make=command("eval", "WORLD/base", "--text", "WORLD/text.txt", "--device", "cuda"), code=1,
        says=("place.device=cuda",)),
    "unknown device": Case(
        make=command("eval", "WORLD/base", "--text", "WORLD/text.txt", "--device", "tpu"), code=1,
        says=("place.device=tpu: take auto, cpu, cuda or cuda:N",)),
    "plan of nothing": Case(make=command("plan", "WORLD/recipe.yaml", "model.path=./nowhere"),
        code=1, says=("./nowhere",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_in_one_line(
    name: str, nibble: Nibble, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    given = case.make(world, tmp_path)
    if given[0] == "train" and not any(word.startswith("output_dir=") for word in given):
        given.append(f"output_dir={tmp_path / 'run'}")
    if "no GPU" in name or "on a GPU" in name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = nibble(*given)
    assert done.code == case.code, done
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("nibble: "), done.err
    for text in case.says:
        assert text in lines[0], lines[0]
    assert len(lines[0]) < 600
    run = tmp_path / "run"
    assert not list(run.glob("*.safetensors")) and not list(run.glob("checkpoint-*"))
    assert "load weights" not in done.out


def test_typers_own_usage_errors_are_short(nibble: Nibble) -> None:
    for words in (["chat"], ["eval", "x", "--num-rows", "0"], ["exprot", "x"]):
        done = nibble(*words)
        assert done.code == 2 and "Traceback" not in done.err and done.out == ""


def test_the_debug_word_keeps_the_traceback(nibble: Nibble, world: Path) -> None:
    from nibble.errors import WeightError

    with pytest.raises(WeightError):
        nibble("--debug", "chat", "./nowhere")


def test_a_bug_keeps_its_traceback(
    nibble: Nibble, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nibble.cli import showing

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(showing, "show_recipes", broken)
    with pytest.raises(ZeroDivisionError):
        nibble("recipes")


def test_a_full_disk_while_checkpointing(nibble: Nibble, world: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the write itself fails."""
    out = tmp_path / "run"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        done = nibble("train", world / "recipe.yaml", f"output_dir={out}", "report.sinks=[]")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.code == 1 and done.err.count("\n") == 1
    assert "checkpoint-3 could not be written" in done.err and "--resume" in done.err
    assert not list(out.glob("*checkpoint*"))
    again = nibble("train", out, "--resume")
    assert again.code == 0 and (out / "checkpoint-3" / "trainer.json").is_file()
