"""One block at a time: the same logits, and never more in memory than what lies outside the blocks
and one of them."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models as small
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from nibble.errors import ExportError
from nibble.spec.config import Recipe
from nibble.use import export as export_module
from nibble.use.assemble import assemble
from nibble.use.export import export
from nibble.use.lazy import LazyModel

CPU = torch.device("cpu")
DORA_NF4 = {
    "adapter": {"kind": "dora", "rank": 4, "modules_to_save": ["lm_head"]},
    "quant": {"format": "nf4"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lazy")


def trained(root: Path, name: str, **sections: Any) -> tuple[Recipe, Path]:
    base = root / "llama"
    if not base.exists():
        small.save_model("llama", base)
    out = root / name
    if not out.exists():
        small.train(small.recipe(base, small.rows_file(root), out, **sections))
    from nibble.train.folder import read_recipe

    return read_recipe(out / "recipe.yaml"), out / "checkpoint-3"


def lazy_model(recipe: Recipe, checkpoint: Path, *, hold: bool) -> LazyModel:
    made = assemble(recipe, to_train=False)
    return LazyModel(
        made.built, values=made.values, trained=small.trained_tensors(checkpoint), device=CPU,
        hold_trained=hold,
    )  # fmt: skip


def in_memory(recipe: Recipe) -> nn.Module:
    from nibble.cli.loading import load, resolve

    return load(resolve(recipe.output_dir, device="cpu")).model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=small.sample_ids()).logits


@pytest.mark.parametrize("name", ["dora", "full"])
def test_a_lazy_model_computes_what_the_whole_one_does(name: str, root: Path) -> None:
    recipe, checkpoint = trained(root, name, **(DORA_NF4 if name == "dora" else {}))
    lazy = lazy_model(recipe, checkpoint, hold=name == "dora")
    held = {n for n, p in lazy.model.named_parameters() if not p.is_meta and "layers" in n}
    assert held == {
        n for n in small.trained_tensors(checkpoint) if "layers" in n and name != "full"
    }
    first, second = logits(lazy.model), logits(lazy.model)
    assert torch.equal(first, logits(in_memory(recipe))) and torch.equal(first, second)
    assert held == {n for n, p in lazy.model.named_parameters() if not p.is_meta and "layers" in n}


class LiveBytes(TorchDispatchMode):
    """The most bytes of CPU storages, made while it is on, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Any = WeakTensorKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self.live[tensor] = (tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        sizes = {pointer: storage.nbytes() for pointer, storage in self.live.values()}
        self.peak = max(self.peak, sum(sizes.values()))
        return out


def test_exporting_holds_one_block(tmp_path: Path) -> None:
    """Live bytes of a 12-block model: what lies outside twice (both models of the comparison), a
    block of each, and the scratch of one; far below the model."""
    import transformers as t

    base = tmp_path / "deep"
    config = small.config_of("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 12, 128, 512
    model = t.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(base)
    small.save_tokenizer(base)
    whole = sum(p.numel() * 4 for p in model.parameters())
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    del model
    given = small.recipe(
        base, small.rows_file(tmp_path), tmp_path / "run", adapter={"kind": "lora", "rank": 2}
    )
    recipe, checkpoint = small.train(given)
    batches = small.held_out(recipe)
    with LiveBytes() as measured:
        done = export(
            recipe, small.trained_tensors(checkpoint), kind="merged", folder=tmp_path / "m",
            batches=batches, device=CPU, max_divergence=1e-3,
        )  # fmt: skip
    assert done.num_bytes > whole
    assert measured.peak < 5 * block < whole / 2


def do_export(recipe: Recipe, checkpoint: Path, folder: Path, **more: Any) -> Any:
    words: dict[str, Any] = {"kind": "merged", "max_divergence": 1e-3, **more}
    given = {"trained": small.trained_tensors(checkpoint), **words}
    return export(recipe, batches=small.held_out(recipe), folder=folder, device=CPU, **given)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_export_that_strays_is_refused_and_removed(
    kind: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, checkpoint = trained(root, "lora", adapter={"kind": "lora", "rank": 4})
    from nibble.nn.adapters import LoraLinear
    from nibble.use.export import save_adapter

    if kind == "merged":
        # The mistake that a bound is for: a merge that forgets the scaling.
        monkeypatch.setattr(LoraLinear, "delta", lambda self: self.lora_B @ self.lora_A)
    else:

        def scaled(model: nn.Module, folder: Path, **words: Any) -> None:
            save_adapter(model, folder, **words)
            from safetensors.torch import load_file, save_file

            file = folder / "adapter_model.safetensors"
            save_file({n: t * 0.3 for n, t in load_file(file).items()}, file)

        monkeypatch.setattr(export_module, "save_adapter", scaled)
    with pytest.raises(ExportError, match=r"nats a token from the trained one, above the bound of"):
        do_export(recipe, checkpoint, tmp_path / "m", kind=kind)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_a_number_is_never_within_the_bound(root: Path, tmp_path: Path) -> None:
    recipe, checkpoint = trained(root, "full")
    tensors = {
        n: torch.full_like(t, torch.nan) for n, t in small.trained_tensors(checkpoint).items()
    }
    with pytest.raises(ExportError, match="above the bound"):
        do_export(recipe, checkpoint, tmp_path / "m", kind="hf", trained=tensors)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_zeros_is_refused(root: Path, tmp_path: Path) -> None:
    recipe, checkpoint = trained(root, "lora", adapter={"kind": "lora", "rank": 4})
    tensors = {
        n: torch.zeros_like(t) if n.endswith("lora_B") else t
        for n, t in small.trained_tensors(checkpoint).items()
    }
    with pytest.raises(ExportError, match=r"all 14 adapters of the checkpoint are zero"):
        do_export(recipe, checkpoint, tmp_path / "m", trained=tensors)


def test_a_folder_that_holds_something_is_left_alone(root: Path, tmp_path: Path) -> None:
    recipe, checkpoint = trained(root, "lora", adapter={"kind": "lora", "rank": 4})
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"exists already: name another with --out"):
        do_export(recipe, checkpoint, folder)
    assert (folder / "mine.txt").read_text() == "mine"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100 KiB: a write fails with EFBIG where a full disk's would."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_leaves_nothing(root: Path, tmp_path: Path, small_files: None) -> None:
    recipe = trained(root, "lora", adapter={"kind": "lora", "rank": 4})[0]
    with pytest.raises(ExportError, match=r"cannot be written"):
        do_export(recipe, root / "lora" / "checkpoint-3", tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["config", "tokenizer", "rename"])
def test_a_full_disk_late_in_an_export_leaves_nothing(
    at: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers as t

    recipe, checkpoint = trained(root, "lora", adapter={"kind": "lora", "rank": 4})

    def full(*args: Any, **words: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "m"))

    owner: Any = {
        "config": t.PreTrainedConfig, "tokenizer": t.PreTrainedTokenizerFast, "rename": Path
    }[at]  # fmt: skip
    monkeypatch.setattr(owner, "rename" if at == "rename" else "save_pretrained", full)
    with pytest.raises(ExportError, match=r"is full.*nothing was kept"):
        do_export(recipe, checkpoint, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_from_scratch_run_is_exported_without_drawing_weights_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, checkpoint = trained(root, "scratch", model={"from_scratch": True})
    from nibble.models import initialise

    def drawn(*args: Any, **words: Any) -> Any:
        raise AssertionError("random weights were drawn")

    monkeypatch.setattr(initialise, "_initialise_part", drawn)
    done = do_export(recipe, checkpoint, tmp_path / "m", kind="hf")
    assert done.divergence.mean == 0
    assert json.loads((done.folder / "config.json").read_text())["model_type"] == "llama"
