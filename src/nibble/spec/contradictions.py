"""Combinations of settings that cannot be meant: a name, when it holds, and what to say; one row
each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from nibble.errors import ConfigError

from .builtin_models import is_builtin
from .config import Recipe
from .effects import NO_ADAPTER, Predicate, projects, quantised
from .graphs import cannot_be_recorded
from .methods import has_int8_weights, low_rank
from .texts import show

DEVICE = re.compile(r"^(auto|cpu|cuda(:\d+)?)$")


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A combination that is refused: its name, when it holds, and what to say."""

    name: str
    holds: Predicate
    message: Callable[[Recipe], str]


def _wrong_projection(r: Recipe) -> str:
    """What is wrong with the options of the projection, or an empty string."""
    low = low_rank(r.optim)
    try:
        if low is not None:
            low.check()
    except ConfigError as error:
        return f"optim: {error}"
    return ""


def _needs_whole_gradients(r: Recipe) -> str:
    """The option that layer-wise mode cannot serve, or an empty string."""
    low = low_rank(r.optim)
    if not r.optim.layerwise or r.optim.in_backward or low is None:
        return ""
    if low.residual != "none":
        of = "" if r.optim.residual else f" (of optim.method={r.optim.method})"
        return f"optim.residual={low.residual}{of}"
    return f"optim.basis={low.basis}" if low.basis in ("svd", "seeded") else ""


def _wants_the_whole_step(r: Recipe) -> str:
    """The option that cannot be served by steps in backward, or an empty string."""
    if not r.optim.in_backward:
        return ""
    if r.optim.max_grad_norm is not None:
        return f"optim.max_grad_norm={r.optim.max_grad_norm:g}"
    if r.train.gradient_accumulation_steps > 1:
        return f"train.gradient_accumulation_steps={r.train.gradient_accumulation_steps}"
    if r.train.precision == "fp16":
        return "train.precision=fp16"
    return "" if r.place.kind in ("auto", "single") else f"place.kind={r.place.kind}"


def _unfit_for_int8(r: Recipe) -> str:
    """What INT8 weights cannot be trained with, or an empty string."""
    if r.train.precision == "fp16":
        return "train.precision=fp16"
    if r.adapter.kind != "none":
        return f"adapter.kind={r.adapter.kind}"
    if (r.place.num_devices or 1) > 1:
        return f"place.num_devices={r.place.num_devices}"
    return "" if r.place.kind in ("auto", "single") else f"place.kind={r.place.kind}"


def _beyond_elements(r: Recipe) -> str:
    """What makes the optimiser look beyond single numbers, or an empty string."""
    if projects(r):
        return "optim.rank" if r.optim.method == "none" else f"optim.method={r.optim.method}"
    if r.optim.layerwise:
        return "optim.layerwise"
    if r.optim.name not in ("adamw", "lion", "sgd"):
        return f"optim.name={r.optim.name}"
    return "optim.state=8bit" if r.optim.state == "8bit" else ""


CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        name="quantised base, nothing to train",
        holds=lambda r: quantised(r) and r.adapter.kind == "none",
        message=lambda r: (
            f"quant.format={r.quant.format} with adapter.kind=none: a quantised base "
            "cannot be trained; choose an adapter (lora, dora, expand) or quant.format=none"
        ),
    ),
    Contradiction(
        name="random base, quantised",
        holds=lambda r: r.model.from_scratch and quantised(r),
        message=lambda r: (
            f"model.from_scratch with quant.format={r.quant.format}: a random base "
            "must be trained itself; use quant.format=none"
        ),
    ),
    Contradiction(
        name="random base, frozen",
        holds=lambda r: (
            r.model.from_scratch
            and r.adapter.kind not in ("none", "factorised")
            and not r.adapter.modules_to_save
        ),
        message=lambda r: (
            f"model.from_scratch with adapter.kind={r.adapter.kind}: a random base "
            "must be trained itself; use adapter.kind=none, or train embeddings, norms and head "
            "beside the adapter with adapter.modules_to_save"
        ),
    ),
    Contradiction(
        name="Triton on a CPU",
        holds=lambda r: r.quant.kernels == "triton" and r.place.device == "cpu",
        message=lambda r: (
            "quant.kernels=triton with place.device=cpu: Triton needs a GPU; use quant.kernels=auto"
        ),
    ),
    Contradiction(
        name="bitsandbytes cannot unpack it",
        holds=lambda r: r.quant.kernels == "bitsandbytes" and r.quant.format in ("hqq", "ternary"),
        message=lambda r: (
            f"quant.kernels=bitsandbytes with quant.format={r.quant.format}: it knows "
            "nf4, fp4 and int8; use quant.kernels=auto"
        ),
    ),
    Contradiction(
        name="fp16 on a CPU",
        holds=lambda r: r.train.precision == "fp16" and r.place.device == "cpu",
        message=lambda r: "train.precision=fp16 with place.device=cpu: use bf16 or fp32",
    ),
    Contradiction(
        name="adapters narrower than the run",
        holds=lambda r: r.train.adapter_precision == "bf16" and r.train.precision != "bf16",
        message=lambda r: (
            "train.adapter_precision=bf16 with "
            f"train.precision={r.train.precision}: use fp32 or auto"
        ),
    ),
    Contradiction(
        name="factors of a given weight",
        holds=lambda r: r.adapter.kind == "factorised" and not r.model.from_scratch,
        message=lambda r: (
            "adapter.kind=factorised without model.from_scratch: factors begin at random and "
            "have no use for weights; use adapter.kind=lora"
        ),
    ),
    Contradiction(
        name="restarts into packed or split bases",
        holds=lambda r: (
            r.optim.restart_every is not None
            and (quantised(r) or r.place.kind in ("fsdp", "stream", "deepspeed"))
        ),
        message=lambda r: (
            f"optim.restart_every={r.optim.restart_every} with "
            + (f"quant.format={r.quant.format}" if quantised(r) else f"place.kind={r.place.kind}")
            + ": adapters are merged into ordinary weights; use quant.format=none and "
            "place.kind single or ddp"
        ),
    ),
    Contradiction(
        name="low rank twice",
        holds=lambda r: projects(r) and r.adapter.kind not in NO_ADAPTER,
        message=lambda r: (
            f"optim.{'rank' if r.optim.method == 'none' else 'method'} with adapter.kind="
            f"{r.adapter.kind}: an adapter's matrices are of low rank already; use "
            "adapter.kind=none, or leave the method and rank out"
        ),
    ),
    Contradiction(
        name="whole gradients, layer by layer",
        holds=lambda r: bool(_needs_whole_gradients(r)),
        message=lambda r: (
            f"optim.layerwise with {_needs_whole_gradients(r)}: it needs whole gradients, which "
            "layer-wise mode does not keep; use basis randomised or random without a residual, "
            "in_backward=true, or layerwise=false"
        ),
    ),
    Contradiction(
        name="steps in backward",
        holds=lambda r: bool(_wants_the_whole_step(r)),
        message=lambda r: (
            f"optim.in_backward with {_wants_the_whole_step(r)}: parameters step before the whole "
            "gradient is known; use optim.max_grad_norm=null, "
            "train.gradient_accumulation_steps=1, bf16 or fp32 and one device, or in_backward=false"
        ),
    ),
    Contradiction(
        name="INT8 weights",
        holds=lambda r: has_int8_weights(r.optim) and bool(_unfit_for_int8(r)),
        message=lambda r: (
            f"optim.weights=int8 with {_unfit_for_int8(r)}: codes are updated where all of the "
            "model is, and all of it is trained; use one device, adapter.kind=none and bf16 or "
            "fp32, or weights=float"
        ),
    ),
    Contradiction(
        name="wrong projection",
        holds=lambda r: bool(_wrong_projection(r)),
        message=_wrong_projection,
    ),
    Contradiction(
        name="8-bit states, stored otherwise",
        holds=lambda r: r.optim.name == "adamw8bit" and r.optim.state not in (None, "8bit"),
        message=lambda r: (
            f"optim.name=adamw8bit with optim.state={r.optim.state}: use name=adamw, or "
            "leave the state out"
        ),
    ),
    Contradiction(
        name="a shape without weights",
        holds=lambda r: is_builtin(r.model.path) and not r.model.from_scratch,
        message=lambda r: (
            f"model.path={r.model.path} is a shape and has no weights: set "
            "model.from_scratch=true, or name a model"
        ),
    ),
    Contradiction(
        name="two ends",
        holds=lambda r: r.train.max_steps is not None and r.train.max_tokens is not None,
        message=lambda r: (
            f"train.max_steps={r.train.max_steps} and train.max_tokens={r.train.max_tokens} both "
            "end the run: keep one"
        ),
    ),
    Contradiction(
        name="a stream without an end",
        holds=lambda r: (
            r.data.streaming and r.train.max_steps is None and r.train.max_tokens is None
        ),
        message=lambda r: (
            "data.streaming without train.max_tokens or train.max_steps: nobody knows how long "
            "a stream is; give one of them"
        ),
    ),
    Contradiction(
        name="a stream of classes",
        holds=lambda r: r.data.streaming and r.model.task == "classification",
        message=lambda r: (
            "data.streaming with model.task=classification: only texts are streamed; use "
            "streaming=false"
        ),
    ),
    Contradiction(
        name="two warm-ups",
        holds=lambda r: r.optim.warmup_steps is not None and r.optim.warmup_ratio is not None,
        message=lambda r: (
            f"optim.warmup_steps={r.optim.warmup_steps} and "
            f"optim.warmup_ratio={r.optim.warmup_ratio} both set the warm-up: keep one"
        ),
    ),
    Contradiction(
        name="two held-out sets",
        holds=lambda r: bool(r.data.eval) and r.data.eval_rows is not None,
        message=lambda r: (
            f"data.eval and data.eval_rows={r.data.eval_rows} both name the held-out rows: keep one"
        ),
    ),
    Contradiction(
        name="graphs of what cannot be recorded",
        holds=lambda r: r.train.cuda_graphs is True and bool(cannot_be_recorded(r)),
        message=lambda r: (
            f"train.cuda_graphs=true with {cannot_be_recorded(r)}: its passes cannot be replayed "
            "as they were recorded; use train.cuda_graphs=auto or false"
        ),
    ),
    Contradiction(
        name="two views of one terminal",
        holds=lambda r: {"progress", "plain"} <= set(r.report.sinks),
        message=lambda r: (
            "report.sinks has progress and plain, which write to one terminal: keep one"
        ),
    ),
    Contradiction(
        name="a sink twice",
        holds=lambda r: len(set(r.report.sinks)) < len(r.report.sinks),
        message=lambda r: f"report.sinks={show(r.report.sinks)} names a sink twice",
    ),
    Contradiction(
        name="unknown device",
        holds=lambda r: not DEVICE.match(r.place.device),
        message=lambda r: f"place.device={r.place.device} is not one of auto, cpu, cuda, cuda:N",
    ),
    Contradiction(
        name="profile after the end",
        holds=lambda r: (
            r.train.profile is not None
            and r.train.max_steps is not None
            and r.train.profile.start_step > r.train.max_steps
        ),
        message=lambda r: (
            "train.profile starts after train.max_steps="
            f"{r.train.max_steps}: lower train.profile.start_step"
        ),
    ),
    Contradiction(
        name="a share of one device",
        holds=lambda r: r.place.kind not in ("auto", "single") and ":" in r.place.device,
        message=lambda r: (
            f"place.kind={r.place.kind} with place.device={r.place.device}: it takes several "
            "devices; use place.device=cuda and place.num_devices"
        ),
    ),
    Contradiction(
        name="several GPUs in one process, without a GPU",
        holds=lambda r: r.place.kind == "dp" and r.place.device == "cpu",
        message=lambda r: (
            "place.kind=dp with place.device=cpu: DataParallel copies to GPUs; use place.kind=ddp"
        ),
    ),
    Contradiction(
        name="one row for several GPUs",
        holds=lambda r: r.place.kind == "dp" and r.train.micro_batch_size == 1,
        message=lambda r: (
            "place.kind=dp with train.micro_batch_size=1: DataParallel splits the rows of a pass; "
            "use two or more, or place.kind=ddp"
        ),
    ),
    Contradiction(
        name="nothing frozen to stream",
        holds=lambda r: r.place.kind == "stream" and r.adapter.kind == "none",
        message=lambda r: (
            "place.kind=stream with adapter.kind=none: only frozen weights are streamed, and "
            "here all are trained; choose an adapter, or place.kind=fsdp"
        ),
    ),
    Contradiction(
        name="deepspeed with a quantised base",
        holds=lambda r: r.place.kind == "deepspeed" and quantised(r),
        message=lambda r: (
            f"place.kind=deepspeed with quant.format={r.quant.format}: ZeRO shards 16-bit "
            "weights; use place.kind=fsdp or stream"
        ),
    ),
    Contradiction(
        name="deepspeed with an optimiser of matrices",
        holds=lambda r: r.place.kind == "deepspeed" and bool(_beyond_elements(r)),
        message=lambda r: (
            f"place.kind=deepspeed with {_beyond_elements(r)}: deepspeed keeps ranges of numbers, "
            "and it looks at rows, columns or blocks of them; use adamw, lion or sgd with 32- or "
            "16-bit states, or place.kind=fsdp"
        ),
    ),
    Contradiction(
        name="deepspeed with factors",
        holds=lambda r: (
            r.place.kind == "deepspeed"
            and r.place.zero_stage == 3
            and r.adapter.kind == "factorised"
        ),
        message=lambda r: (
            "place.kind=deepspeed with adapter.kind=factorised: random factors are not made in "
            "pieces; use place.zero_stage=2, or place.kind=ddp"
        ),
    ),
)
