"""Words of other trainers that are more than another name for a setting.

Each function takes a word's value and the layer it stands in, and yields what it claims. Factories
(`choice`, `switch`) make the common ones; the table that uses them is `aliases.py`, and words about
data are in `translations_data.py`. A value that
nibble cannot express raises Refused with what to write instead: nothing is dropped in silence.

Facts about the other trainers' words come from their documentation and configuration schemas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .texts import show
from .words import Claim, Layer, Refused, Translator

DORA_WORDS = ("use_dora", "peft_use_dora")
FOUR_BIT_TYPE_WORDS = (
    "bnb_4bit_quant_type",
    "quantization_type",
    "quantization.bnb_4bit_quant_type",
)
PRECISION_WORDS = ("fp16", "float16", "dtype", "torch_dtype", "precision", "train.precision")
METHOD_WORDS = ("quant_method", "quantization_method")
MLP = ("gate_proj", "up_proj", "down_proj")


def choice(path: str, values: Mapping[Any, Any]) -> Translator:
    """A word with its own values for one setting; any other value is refused by name."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        value = tuple(value) if isinstance(value, list) else value
        for given, canonical in values.items():
            if given == value and isinstance(given, bool) == isinstance(value, bool):
                yield Claim(path, canonical)
                return
        allowed = ", ".join(show(given) for given in values)
        raise Refused(f"{show(value)} has no counterpart for {path}: one of {allowed}")

    return translate


def switch(path: str, on: Any, off: Any) -> Translator:
    """A boolean word of a setting that is not one."""
    return choice(path, {True: on, False: off})


def only(*values: Any, advice: str) -> Translator:
    """A word whose one meaning is what nibble does anyway; other values are refused."""

    def translate(value: Any, layer: Layer) -> Iterable[Claim]:
        if any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            return ()
        raise Refused(f"{show(value)} is not supported: {advice}")

    return translate


def same_as(path: str) -> Translator:
    """A word for something nibble ties to another setting: it must agree with it."""
    return lambda value, layer: [Claim(path, value, "agree")]


def modules(*names: str) -> Translator:
    """A boolean word that adds modules to the adapter's targets."""
    return lambda value, layer: [Claim("adapter.targets", list(names), "add")] if value else []


# Storage of the base ------------------------------------------------------------------------------


def _four_bit_format(layer: Layer) -> str:
    kind = str(layer.says(*FOUR_BIT_TYPE_WORDS) or "nf4").lower()
    return kind if kind in ("nf4", "fp4") else "nf4"


def load_in_4bit(value: Any, layer: Layer) -> Iterator[Claim]:
    if value is True:
        yield Claim("quant.format", _four_bit_format(layer))
    elif value is False:
        yield Claim("quant.format", "nf4", "deny")
    else:
        raise Refused(f"{show(value)} is not true or false")


def load_in_8bit(value: Any, layer: Layer) -> Iterator[Claim]:
    if not isinstance(value, bool):
        raise Refused(f"{show(value)} is not true or false")
    yield Claim("quant.format", "int8", "set" if value else "deny")


def quantization_bit(value: Any, layer: Layer) -> Iterator[Claim]:
    """LLaMA-Factory and swift: a width, with the method in another word (bitsandbytes or hqq)."""
    method = str(layer.says(*METHOD_WORDS) or "bnb").lower()
    if method == "hqq":
        yield Claim("quant.format", "hqq")
        yield Claim("quant.bits", value)
    elif value in (4, 8):
        yield Claim("quant.format", _four_bit_format(layer) if value == 4 else "int8")
    else:
        raise Refused(f"{show(value)} bits: one of 4 (nf4), 8 (int8), or hqq with 1, 2, 3, 4, 8")


def quant_method(value: Any, layer: Layer) -> Iterator[Claim]:
    """Says nothing by itself beside a width; hqq alone is hqq."""
    name = str(value).lower()
    if name == "hqq":
        yield Claim("quant.format", "hqq")
    elif name not in ("bnb", "bitsandbytes"):
        raise Refused(f"{show(value)} is not supported: bnb (nf4, fp4, int8) or hqq")
    elif not layer.says("quant_bits", "quantization_bit", "load_in_4bit", "load_in_8bit"):
        raise Refused(f"{show(value)} without a width: give quant.format (nf4, fp4 or int8)")


def litgpt_quantize(value: Any, layer: Layer) -> Iterator[Claim]:
    names = {"bnb.nf4": "nf4", "bnb.fp4": "fp4", "bnb.nf4-dq": "nf4", "bnb.fp4-dq": "fp4"}
    if value in names:
        yield Claim("quant.format", names[value])
        yield Claim("quant.double_quant", str(value).endswith("-dq"))
    elif value in ("bnb.int8", "bnb.int8-training"):
        yield Claim("quant.format", "int8")
    else:
        raise Refused(f"{show(value)} is not one of {', '.join(names)}, bnb.int8")


# Adapters -----------------------------------------------------------------------------------------


def adapter_name(value: Any, layer: Layer) -> Iterator[Claim]:
    """axolotl's adapter, LLaMA-Factory's finetuning_type, mlx-lm's fine_tune_type, swift's type."""
    name = "none" if value in (None, False) else str(value).lower()
    if name == "qlora":
        yield Claim("quant.format", _four_bit_format(layer))
    if name in ("lora", "qlora"):
        yield from _lora(True, layer)
    elif name in ("none", "full", "dora", "expand"):
        yield Claim("adapter.kind", "none" if name == "full" else name)
    else:
        raise Refused(f"{show(value)} is not supported yet: one of lora, qlora, dora, expand, none")


def _lora(value: Any, layer: Layer) -> Iterator[Claim]:
    yield Claim("adapter.kind", "dora" if layer.says(*DORA_WORDS) else "lora")


def use_peft(value: Any, layer: Layer) -> Iterator[Claim]:
    yield from _lora(True, layer) if value else [Claim("adapter.kind", "lora", "deny")]


def use_dora(value: Any, layer: Layer) -> Iterator[Claim]:
    yield Claim("adapter.kind", "dora", "set" if value else "deny")


def lora_target(value: Any, layer: Layer) -> Iterator[Claim]:
    """`all` and `all-linear` are every linear but the head; else names, a list or `a,b`."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        value = ["all-linear"]
    yield Claim("adapter.targets", value)


def target_linear(value: Any, layer: Layer) -> Iterator[Claim]:
    """axolotl: true adds all linears to whatever lora_target_modules names."""
    if value and not layer.says("lora_target_modules"):
        yield Claim("adapter.targets", ["all-linear"])


def torchtune_modules(value: Any, layer: Layer) -> Iterator[Claim]:
    names = ["o_proj" if name == "output_proj" else name for name in value]
    yield Claim("adapter.targets", names, "add")


def torchtune_builder(value: Any, layer: Layer) -> Iterator[Claim]:
    """`torchtune.models.llama3_1.qlora_llama3_1_8b` names the method in its last part."""
    name = str(value).rpartition(".")[2]
    if name.startswith(("lora_", "qlora_")):
        yield from adapter_name(name.partition("_")[0], layer)
    if not layer.says("checkpointer.checkpoint_dir"):
        raise Refused("a torchtune builder does not say where the weights are: give model.path")


def mlx_scale(value: Any, layer: Layer) -> Iterator[Claim]:
    """mlx-lm multiplies the update by `scale` itself; here the factor is alpha / rank."""
    yield Claim("adapter.alpha", value * layer.value("adapter.rank"))


# The update rule and the loop ---------------------------------------------------------------------


def adam_beta1(value: Any, layer: Layer) -> Iterator[Claim]:
    second = layer.says("adam_beta2") or layer.value("optim.betas")[1]
    yield Claim("optim.betas", [value, second])


def adam_beta2(value: Any, layer: Layer) -> Iterator[Claim]:
    first = layer.says("adam_beta1") or layer.value("optim.betas")[0]
    yield Claim("optim.betas", [first, value])


def warmup_steps(value: Any, layer: Layer) -> Iterator[Claim]:
    """transformers 5 takes a share of all steps here as well."""
    share = isinstance(value, float) and 0 < value < 1
    yield Claim("optim.warmup_ratio" if share else "optim.warmup_steps", value)


def min_lr(value: Any, layer: Layer) -> Iterator[Claim]:
    yield Claim("optim.floor_ratio", value / layer.value("optim.learning_rate"))


def component(path: str) -> Translator:
    """A torchtune component such as torch.optim.AdamW: the class name is the value."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        name = str(value).rpartition(".")[2]
        for part in ("get_", "_schedule_with_warmup"):
            name = name.replace(part, "")
        yield Claim(path, name)

    return translate


def global_batch_size(value: Any, layer: Layer) -> Iterator[Claim]:
    """litgpt and Automodel give rows of a whole update; on one device that is micro x steps."""
    micro = layer.value("train.micro_batch_size")
    if not isinstance(value, int) or value % micro:
        raise Refused(f"{show(value)} is not a multiple of train.micro_batch_size={micro}")
    yield Claim("train.gradient_accumulation_steps", value // micro)


def mlx_iters(value: Any, layer: Layer) -> Iterator[Claim]:
    """mlx-lm counts micro-batches; an update takes gradient_accumulation_steps of them."""
    steps = layer.value("train.gradient_accumulation_steps")
    if not isinstance(value, int) or value % steps:
        raise Refused(f"{show(value)} is not a multiple of the {steps} passes in one update")
    yield Claim("train.max_steps", value // steps)


def mixed_precision(name: str) -> Translator:
    """The booleans bf16 and fp16; `auto` is bf16 here."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        if value is True or (value in ("auto", "full") and name == "bf16"):
            yield Claim("train.precision", name)
        elif value is False and name == "bf16" and not layer.says(*PRECISION_WORDS):
            raise Refused("false leaves the type open: give train.precision (fp32 or fp16)")
        elif value is False:
            yield Claim("train.precision", name, "deny")
        else:
            raise Refused(f"{show(value)} is not true or false")

    return translate


def steps(path: str) -> Translator:
    """A number of steps; a share of the run (transformers) is refused."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        if isinstance(value, float) and 0 < value < 1:
            raise Refused(f"{show(value)} of a run is not supported: give {path} in steps")
        yield Claim(path, value)

    return translate


def when(path: str) -> Translator:
    """eval_strategy, save_strategy: `steps` goes with a number; `epoch` is refused."""

    def translate(value: Any, layer: Layer) -> Iterator[Claim]:
        if value in ("no", False):
            yield Claim(path, None)
        elif value != "steps":
            raise Refused(f"{show(value)} is not supported: give {path} in steps")

    return translate


def gpu_memory(value: Any, layer: Layer) -> Iterator[Claim]:
    yield Claim("place.vram", f"{value}GiB" if isinstance(value, int | float) else value)


# Reports ------------------------------------------------------------------------------------------


def report_to(value: Any, layer: Layer) -> Iterator[Claim]:
    """`none`, one name or a list; the live view stays unless `stdout` takes its place."""
    names = [str(v).lower() for v in (value if isinstance(value, list) else [value])]
    sinks = ["plain"] if "stdout" in names else ["progress"]
    for name in names:
        if name in ("wandb", "tensorboard"):
            sinks.append(name)
        elif name not in ("none", "false", "tqdm", "stdout"):
            raise Refused(f"{name} is not supported: none, wandb, tensorboard, stdout")
    yield Claim("report.sinks", sinks)


def use_sink(name: str) -> Translator:
    return lambda value, layer: [Claim("report.sinks", _with_view(layer, name))] if value else []


def _with_view(layer: Layer, name: str) -> list[str]:
    """The live view and every sink that the layer's switches name."""
    switches = {
        "wandb": ("use_wandb", "wandb_project", "wandb"),
        "tensorboard": ("use_tensorboard",),
    }
    on = [sink for sink, words in switches.items() if sink == name or layer.says(*words)]
    return ["progress", *on]


def wandb_project(value: Any, layer: Layer) -> Iterator[Claim]:
    """axolotl and mlx-lm: naming a project turns wandb on."""
    yield Claim("report.project", value)
    if not layer.says("report_to", "report.sinks", "sinks"):
        yield Claim("report.sinks", _with_view(layer, "wandb"))
