"""Adapters on disk, in peft's files: adapter_config.json and adapter_model.safetensors.

A tensor is called as peft calls it: `base_model.model.`, the name of the wrapped linear, then
`lora_A.weight` [r, in], `lora_B.weight` [out, r] or `lora_magnitude_vector` [out]; a module trained
in full keeps the names of its parameters. So peft, vLLM and whatever reads its files load ours, and
we load theirs: plain, rank-stabilised and DoRA, with modules_to_save.

What a config asks for and we do not do is refused by its name: an option that is silently dropped
gives other logits. That also goes for initialisations that change the base (PiSSA, OLoRA, CorDA,
LoftQ, LoRA-GA): their adapters mean nothing beside the base as it was published.

Files are written under another name and renamed, the config last: a folder with a config is whole.
Only safetensors is read, never a pickle. Costs: the adapter's bytes on the host once more while it
is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nibble.errors import CheckpointError, ConfigError, WeightError
from nibble.nn.adapters import LoraLinear, adapters
from nibble.nn.targets import classification_heads
from nibble.spec.config import Adapter, Task
from nibble.spec.names import meets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES: dict[Task, str] = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS"}
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is."""

READ_FIELDS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "modules_to_save",
    "init_lora_weights",
    "peft_type",
}
IDLE_FIELDS = {
    # About where the adapter comes from or how it was made, not about what it computes.
    "base_model_name_or_path",
    "revision",
    "task_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "layers_pattern",
    "ensure_weight_tying",
}
"""Fields without a say in what a saved adapter computes."""
NARROWING_FIELDS = ("exclude_modules", "layers_to_transform")
"""With these the targets do not say where the adapter is; the names of its tensors do."""


Put = Callable[[nn.Parameter, Tensor], None]


def _copy_(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    base_name: str | None,
    adapter: Adapter,
    task: Task,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters and fully trained modules of `model` to `folder` as peft would.

    `values` are the trained tensors by the model's names, where the model does not have all of
    them. `base_name` is the model that peft should load (a folder or hub id). Raises ConfigError
    for kinds that are no peft adapter, CheckpointError when the folder cannot be written; nothing
    half-written is left behind.
    """
    if adapter.kind not in ("lora", "dora"):
        raise ConfigError(
            f"adapter.kind={adapter.kind} trains weights of the model itself, which an adapter "
            "file cannot hold; export the merged model instead"
        )
    first = {id(p): name for name, p in model.named_parameters()}  # tied ones have one value
    tensors = {
        name: _on_host(parameter if values is None else values[first[id(parameter)]])
        for name, parameter in _named_tensors(model)
    }
    config = _peft_config(model, base_name=base_name, adapter=adapter, task=task)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config_path.unlink(missing_ok=True)
        _write(weights_path, lambda part: save_file(tensors, part, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        _write(config_path, lambda part: part.write_text(text))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter cannot be written to {folder}: {error}; "
            "free space or choose another folder"
        ) from error


def load_adapter(model: nn.Module, folder: Path, *, put: Put = _copy_) -> None:
    """Copy the tensors of a peft folder into a model that `adapt_` prepared for them.

    `put` copies a whole value into a parameter that may live elsewhere in part. The types of the
    model's parameters stay. Raises WeightError when a tensor is missing, left over or of another
    shape, or when the folder's scaling or kind differs from the model's; the model is then
    unchanged.
    """
    _check_scaling(model, read_adapter_config(folder), folder)
    wanted = dict(_named_tensors(model))
    with _opened(folder) as file:
        stored = {_our_key(key): key for key in file.keys()}  # noqa: SIM118 (not a dict)
        missing, left_over = sorted(wanted.keys() - stored), sorted(stored.keys() - wanted)
        if missing or left_over:
            first = f"{missing[0]} is missing" if missing else f"{left_over[0]} has no place"
            raise WeightError(
                f"the adapter in {folder} does not fit the model: {first} "
                f"({len(missing)} missing, {len(left_over)} left over); "
                "give the targets and modules_to_save it was made with"
            )
        for key, parameter in wanted.items():
            shape = tuple(file.get_slice(stored[key]).get_shape())
            if shape != tuple(parameter.shape):
                raise WeightError(
                    f"{key} in {folder} has shape {shape}, the model needs "
                    f"{tuple(parameter.shape)}; is it the adapter of another model?"
                )
        with torch.no_grad():
            for key, parameter in wanted.items():
                put(parameter, file.get_tensor(stored[key]))


def read_adapter_config(folder: Path) -> Adapter:
    """The recipe's adapter section that a peft folder means.

    Targets and modules that no tensor of the folder belongs to are left out. Raises WeightError for
    a folder without an adapter, another method than LoRA, and for every option that we cannot
    honour.
    """
    config = _read_config(folder)
    _refuse_unknown(config, folder)
    with _opened(folder) as file:
        keys = [_our_key(key) for key in file.keys()]  # noqa: SIM118 (not a dict)
    marks = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    wrapped = {
        key.rpartition(".lora_")[0].removeprefix(PREFIX) for key in keys if key.endswith(marks)
    }
    whole = [key.removeprefix(PREFIX) for key in keys if not key.endswith(marks)]
    endings = config.get("modules_to_save") or []
    saved = {module for ending in endings for name in whole for module in _saved_as(ending, name)}
    given = config.get("target_modules") or []
    if any(config.get(field) is not None for field in NARROWING_FIELDS):
        targets = sorted(wrapped)
    elif isinstance(given, str):
        targets = [given]
    else:
        targets = [t for t in sorted(given) if any(n == t or n.endswith(f".{t}") for n in wrapped)]
    if not targets or not wrapped:
        raise WeightError(f"the adapter in {folder} holds no tensor of its target_modules {given}")
    return Adapter(
        kind="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        rank_stabilised=bool(config.get("use_rslora")),
        targets=tuple(targets),
        modules_to_save=tuple(sorted(saved)),
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """peft's name and the parameter, of all that is trained in `model`."""
    inside: set[str] = set()
    for name, module in adapters(model).items():
        yield f"{PREFIX}{name}.lora_A.weight", module.lora_A
        yield f"{PREFIX}{name}.lora_B.weight", module.lora_B
        inside |= {f"{name}.lora_A", f"{name}.lora_B", f"{name}.magnitude"}
        if module.magnitude is not None:
            yield f"{PREFIX}{name}.lora_magnitude_vector", module.magnitude
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and name not in inside:
            yield PREFIX + name, parameter


def _our_key(key: str) -> str:
    """A stored key as `_named_tensors` writes it; older peft versions added parts to some."""
    key = key.replace(".modules_to_save.", ".")
    if key.endswith(".lora_magnitude_vector.weight"):
        key = key.removesuffix(".weight")
    return key


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of its own: safetensors refuses tensors that share memory (tied ones)."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _peft_config(
    model: nn.Module, *, base_name: str | None, adapter: Adapter, task: Task
) -> dict[str, Any]:
    saved = list(dict.fromkeys([*adapter.modules_to_save, *classification_heads(model)]))
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": _saved_names(model, saved) or None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "revision": None,
        "target_modules": _target_modules(model),
        "task_type": TASK_TYPES[task],
        "use_dora": adapter.kind == "dora",
        "use_rslora": adapter.rank_stabilised,
    }


def _saved_names(model: nn.Module, patterns: list[str]) -> list[str]:
    """Full names of the fully trained modules: peft takes no regular expressions here."""
    names = [name for name, _ in model.named_modules() if name]
    met = [name for name in names if any(meets(pattern, name) for pattern in patterns)]
    return [n for n in met if not any(n.startswith(f"{other}.") for other in met)]


def _target_modules(model: nn.Module) -> list[str]:
    """Last parts of the wrapped names where they mean exactly these modules, else the full
    names."""
    wrapped = adapters(model)
    leaves = sorted({name.rpartition(".")[2] for name in wrapped})
    met = {
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in leaves and not _inside(name, wrapped)
    }
    return leaves if met == set(wrapped) else sorted(wrapped)


def _inside(name: str, wrapped: dict[str, LoraLinear]) -> bool:
    """Whether `name` is a part of an adapter: its `base`, which peft's model does not have."""
    return name.rpartition(".")[0] in wrapped


def _saved_as(ending: str, name: str) -> Iterator[str]:
    """What modules_to_save calls the module of parameter `name` that peft means by `ending`.

    peft compares the ends of names letter by letter, so that `norm` also means `input_layernorm`;
    such a module is called by its full name here.
    """
    parts = name.split(".")[:-1]
    modules = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    met = [module for module in modules if module.endswith(ending)]
    if met:
        outer = met[0]
        yield ending if f".{outer}".endswith(f".{ending}") else outer


def _check_scaling(model: nn.Module, stored: Adapter, folder: Path) -> None:
    scaling = stored.alpha / (stored.rank**0.5 if stored.rank_stabilised else stored.rank)
    for name, module in adapters(model).items():
        kind = "lora" if module.magnitude is None else "dora"
        if kind != stored.kind or abs(module.scaling - scaling) > 1e-6 * scaling:
            raise WeightError(
                f"the adapter in {folder} is {stored.kind} scaled by {scaling:g}, "
                f"{name} in the model is {kind} scaled by {module.scaling:g}; "
                "give the kind, rank and alpha it was made with"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise WeightError(
            f"{folder} is not a saved adapter: {CONFIG_FILE} and {WEIGHTS_FILE} are needed "
            "(pickled adapter_model.bin files are not read)"
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise WeightError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        given = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise WeightError(f"{path}: peft_type is {given}; only LORA (with DoRA) can be loaded")
    return config


def _refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    """Raise WeightError for the first option with an effect that we do not have."""
    initial = config.get("init_lora_weights", True)
    if initial not in HARMLESS_INITS:
        raise WeightError(
            f"{folder / CONFIG_FILE}: init_lora_weights={initial!r} changes the base weights; "
            "convert the adapter to plain LoRA first (peft's save_pretrained can do it)"
        )
    for field, value in config.items():
        idle = not value or value == "none" or field in (*IDLE_FIELDS, *NARROWING_FIELDS)
        if field not in READ_FIELDS and not idle:
            raise WeightError(
                f"{folder / CONFIG_FILE}: {field}={value!r} cannot be honoured; only plain LoRA, "
                "rsLoRA, DoRA and modules_to_save can be loaded"
            )


def _opened(folder: Path) -> Any:
    path = folder / WEIGHTS_FILE
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{path} is damaged or truncated: {error}; copy it again") from error


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, make it durable, and rename it."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
