"""DataParallel: the same loss and gradients as one device, by torch's parts, and what it refuses.

Without two GPUs torch's four parts are stood in for by what they do to tensors of one device:
copies whose parameters are tensors with a gradient, rows dealt out, results joined.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from test_single import fill, tiny, truth
from torch import nn

from nibble.data import Batch
from nibble.errors import ConfigError, NibbleWarning, PlacementError
from nibble.nn.adapters import adapt_, finish_loading_, reset_parameters_
from nibble.nn.quant import quantize_
from nibble.place import Group, dp
from nibble.place.activations import Activations
from nibble.place.single import Single, one_device
from nibble.spec.config import Adapter, Place, Quant, Recipe
from nibble.spec.formats import format_spec
from nibble.spec.rules import check
from nibble.use.objective import call

CPU = torch.device("cpu")


def copies(network: nn.Module, devices: Any, detach: bool = False) -> list[nn.Module]:
    """torch's replicate, with parameters that are copied to where they are already."""
    made = []
    for _ in devices:
        modules = {m: m._replicate_for_data_parallel() for m in network.modules()}
        for module, copy in modules.items():
            for name, child in module._modules.items():
                if child is not None:
                    setattr(copy, name, modules[child])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    copy._parameters[name] = None
                else:
                    value = parameter.detach() if detach else parameter
                    setattr(copy, name, value * 1 if value.is_floating_point() else value)
        made.append(modules[network])
    return made


def dealt(args: Any, words: Any, devices: Any) -> Any:
    rows = [words["input_ids"][i::2] for i in range(2)]
    return [()] * 2, [{**words, "input_ids": part} for part in rows]


def one_after_the_other(modules: Any, inputs: Any, words: Any, devices: Any) -> list[Any]:
    found = [m(*i, **w) for m, i, w in zip(modules, inputs, words, strict=True)]
    assert all(one.past_key_values is None for one in found), "torch cannot join caches"
    return found


def model_of(place: Single, policy: str, quant: str | None) -> tuple[nn.Module, Any]:
    built = tiny(tied=False)
    if quant is not None:
        quantize_(built.model, format_spec(Quant(format=quant)))  # type: ignore[arg-type]
        adapt_(
            built.model, Adapter(kind="lora", rank=2), dtype=torch.float32,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    model = place.arrange(built, activations=Activations(policy=policy))
    fill(place, model, truth(built.config))
    if quant is not None:
        reset_parameters_(model, generator=torch.Generator().manual_seed(1))
        finish_loading_(model)
    return model.train(), built.family


def step(model: nn.Module, family: Any) -> tuple[float, dict[str, Any]]:
    ids = torch.arange(24).view(4, 6) % 64
    batch = Batch(
        input_ids=ids, labels=ids, position_ids=None, attention_mask=None, num_targets=24,
        num_tokens=24, doc_lengths=((6,),) * 4,
    )  # fmt: skip
    states = call(family.decoder(model), batch, family)[0]
    loss = family.head(model)(states).float().square().mean()
    loss.backward()
    return float(loss.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_copies_compute_what_one_device_does(
    policy: str, quant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(dp, "_devices", lambda place, group: [CPU, CPU])
    monkeypatch.setattr(dp, "replicate", copies)
    monkeypatch.setattr(dp, "scatter_kwargs", dealt)
    monkeypatch.setattr(dp, "parallel_apply", one_after_the_other)
    monkeypatch.setattr(
        dp, "gather", lambda parts, device: (torch.stack([p[0] for p in parts], 1).flatten(0, 1),)
    )
    checkpoint = dp.checkpoint
    monkeypatch.setattr(dp, "checkpoint", lambda *a, **w: (calls.append(1), checkpoint(*a, **w))[1])
    with pytest.warns(NibbleWarning, match=r"place\.kind=ddp gives the same gradients, .*fast"):
        place = dp.DataParallel(Place(device="cpu"), Group.alone(CPU))
    loss, gradients = step(*model_of(place, policy, quant))
    expected, truths = step(*model_of(one_device(Place(device="cpu")), policy, quant))
    assert loss == pytest.approx(expected, abs=1e-6)
    assert gradients.keys() == truths.keys() and len(truths) > 5
    for name, gradient in truths.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)
    assert len(calls) == (4 if policy == "full" else 0), "two blocks on two copies"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does() -> None:
    with pytest.warns(UserWarning, match="ddp"):
        place = dp.DataParallel(Place(device="cuda"), Group.alone(torch.device("cuda", 0)))
    results = []
    for one in (place, one_device(Place(device="cuda:0"))):
        model, family = model_of(one, "full", "nf4")
        with torch.device("cuda:0"):
            results.append(step(model, family))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient, atol=1e-5, rtol=1e-4)


def test_the_warning_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp, "DDP_TIMES", 2.5)
    assert "gradients, 2.5 times as fast on Llama-3-8B QLoRA" in dp.advice()


def test_a_command_shows_the_warning_as_a_note() -> None:
    """It silences libraries' warnings, but not ours."""
    program = (
        "import warnings\n"
        "from nibble.cli.quiet import quiet_libraries\n"
        "from nibble.errors import NibbleWarning\n"
        "quiet_libraries()\n"
        "warnings.warn('of a library')\n"
        "warnings.warn('place.kind=ddp is faster', NibbleWarning)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stderr == "note: place.kind=ddp is faster\n"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlacementError, match=r"none answers: use place\.kind=ddp"):
        dp._devices(Place(), Group.alone(CPU))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    alone = Group.alone(torch.device("cuda", 0))
    with pytest.raises(PlacementError, match="one GPU has nobody to share with"):
        dp._devices(Place(), alone)
    with pytest.raises(PlacementError, match="num_devices=3, but this machine shows 1"):
        dp._devices(Place(num_devices=3), alone)
    words = {"model": {"path": "x"}, "place": {"kind": "dp"}, "train": {"micro_batch_size": 1}}
    with pytest.raises(ConfigError, match="splits the rows of a pass"):
        check(Recipe.model_validate(words))
