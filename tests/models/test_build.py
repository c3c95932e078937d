"""What is refused before a model is built, and the tokenizer that belongs to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nibble.errors import ConfigError, WeightError
from nibble.models import build, load_tokenizer
from nibble.models.locate import locate
from nibble.spec.config import Model

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def folder(path: Path, **changes: object) -> Model:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    return Model(path=str(path))


def refused(model: Model) -> str:
    with pytest.raises((WeightError, ConfigError)) as caught:
        build(model, dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_things_are_named(tmp_path: Path) -> None:
    assert "does not exist" in refused(Model(path="./nowhere/at/all"))
    assert "does not exist" in refused(Model(path=str(tmp_path / "model.gguf")))
    assert "no config.json" in refused(Model(path=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter.path" in refused(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{ not json")
    assert "cannot be read as JSON" in refused(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in refused(Model(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert "no model_type" in refused(Model(path=str(tmp_path)))
    assert "not a .gguf" in refused(Model(path=str(tmp_path / "config.json")))


def test_families_and_formats_that_cannot_be_read(tmp_path: Path) -> None:
    unknown = refused(folder(tmp_path, model_type="lama"))
    assert "'lama'" in unknown and "nearest: llama" in unknown
    code = refused(folder(tmp_path, model_type="ownmodel", auto_map={"AutoConfig": "x.Y"}))
    assert "trust_remote_code" in code
    gptq = refused(folder(tmp_path, quantization_config={"quant_method": "gptq"}))
    assert "gptq" in gptq
    wrong = refused(folder(tmp_path, hidden_size="wide"))
    assert "config.json is not valid" in wrong


def test_pickle_is_never_read(tmp_path: Path) -> None:
    model = folder(tmp_path)
    assert "no .safetensors" in refused(model)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "never loads pickle" in refused(model)
    assert build(model.model_copy(update={"from_scratch": True}), dtype=torch.float32)


def test_a_task_that_the_family_lacks(tmp_path: Path) -> None:
    model = folder(tmp_path, model_type="vit").model_copy(update={"from_scratch": True})
    assert "no causal-lm model" in refused(model)


def test_a_revision_is_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only for hub ids"):
        locate(str(tmp_path), revision="main")


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    # The client reads HF_HUB_OFFLINE when it is imported; this is the value it then uses.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused(Model(path="nobody/no-such-model"))
    assert "nobody/no-such-model" in message and "HF_HUB_OFFLINE" in message


def shared() -> Path:
    root = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("NIBBLE_SHARED", root.parent / "shared"))


def test_the_story_model_tells_a_story(tmp_path: Path) -> None:
    path = shared() / "data" / "models" / "stories260K-hf"
    if not path.is_dir():
        pytest.skip("needs the shared model stories260K-hf: set NIBBLE_SHARED")
    from nibble.models import materialise
    from nibble.weights import open_weights, stream

    recipe = Model(path=str(path))
    built = build(recipe, dtype=torch.float32)
    materialise(built.model, device="cpu")
    targets = dict(built.model.named_parameters())
    with torch.no_grad():
        for name, value in stream(open_weights(path), built.skeleton):
            targets[name].copy_(value)
    rows = built.model.get_input_embeddings().weight.shape[0]
    tokenizer = load_tokenizer(recipe, num_embeddings=rows)
    assert tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            logits = built.model(ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert "there was a" in tokenizer.decode(ids[0])


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(70)} | {"<unk>": 70}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    loaded = load_tokenizer(model, num_embeddings=71)
    assert loaded.pad_token == "<unk>" and len(loaded) == 71
    with pytest.raises(WeightError, match="ids up to 70, but the model has 64"):
        load_tokenizer(model, num_embeddings=64)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightError, match=r"model\.tokenizer") as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)
