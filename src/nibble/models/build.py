"""A transformers model on the meta device, with all that must be known to fill, train and save it.

Nothing is allocated and no weight is read: shapes come from config.json (or from a GGUF's
metadata), and the checkpoint is streamed in later. Two copies are built, which costs a second at
most: `model` is quantised, adapted and placed; the `skeleton` stays as the family defines it, so
that names and shapes of the checkpoint can be checked against it however much the model has
changed. GPT-2's Conv1D is an nn.Linear in both. Code that a checkpoint brings is run only if the
recipe says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nibble.errors import ConfigError, WeightError
from nibble.models.conv1d import replace_conv1d_
from nibble.models.family import Family, describe
from nibble.models.gguf_cache import read_config as read_gguf_config
from nibble.models.initialise import initial_values, random_weights
from nibble.models.locate import locate, read_config, refuse_pickle
from nibble.spec.config import Model


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model without weights. `path` is the local folder or .gguf file that they come from.

    `model` and `skeleton` are alike and on meta; give the skeleton to `weights.stream`.
    `transposed` names the weights that the checkpoint's layout stores as [in, out]. `quantization`
    is the checkpoint's own quantisation, taken out of `config`.
    """

    model: nn.Module
    skeleton: nn.Module
    config: Any
    family: Family
    path: Path
    transposed: frozenset[str]
    quantization: dict[str, Any] | None

    def initial_values(self, names: Sequence[str], seed: int) -> Iterator[tuple[str, Tensor]]:
        """Fresh values for parameters that the checkpoint lacks, such as a new task's head."""
        return initial_values(self.skeleton, names, seed=seed)

    def random_weights(
        self, *, seed: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[str, Tensor]]:
        """All weights from scratch, one block in memory at a time."""
        return random_weights(
            self.skeleton, block_path=self.family.block_path, seed=seed, device=device
        )


def build(model: Model, *, dtype: torch.dtype, attention: str = "sdpa") -> Built:
    """Build the model that a recipe names, on the meta device.

    `attention` is an implementation of transformers; `sdpa` is `eager` where a family has no sdpa.
    `dtype` is the type of its parameters, except those that the family insists on keeping in fp32.
    Raises WeightError for a checkpoint that is missing, pickled, of an unknown family or without
    the task; ConfigError for a wrong attention.
    """
    path = locate(model.path, revision=model.revision, with_code=model.trust_remote_code)
    config, quantization = load_config(path, trust_remote_code=model.trust_remote_code)
    if path.is_dir() and not model.from_scratch:
        refuse_pickle(path)
    if model.vocab_size is not None:
        config.vocab_size = model.vocab_size
    if model.task == "classification" and model.num_labels is not None:
        config.num_labels = model.num_labels
        if model.num_labels == 1:
            config.problem_type = "regression"
    real = _instantiate(config, model, dtype=dtype, attention=attention)
    skeleton = _instantiate(config, model, dtype=dtype, attention=attention)
    transposed = replace_conv1d_(real)
    replace_conv1d_(skeleton)
    return Built(
        model=real,
        skeleton=skeleton,
        config=real.config,
        family=describe(skeleton, task=model.task),
        path=path,
        transposed=transposed,
        quantization=quantization,
    )


def load_config(
    path: Path, *, trust_remote_code: bool = False
) -> tuple[Any, dict[str, Any] | None]:
    """The transformers configuration of a folder or .gguf file, and the quantisation it declares
    (removed from it)."""
    from transformers import AutoConfig

    if path.suffix == ".gguf":
        return read_gguf_config(path), None
    raw = read_config(path)
    _check_family(raw, path, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Strict configuration classes raise their own kinds for wrong fields; the file is at fault
        # in all of them.
        raise WeightError(f"{path / 'config.json'} is not valid: {_first_line(error)}") from None
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = str(quantization.get("quant_method", "bitsandbytes"))
        if method != "bitsandbytes":
            raise WeightError(
                f"{path} is quantised with {method}; nibble reads 16-bit, bitsandbytes and GGUF "
                "weights: "
                "take the original model and set quant.format"
            )
        del config.quantization_config
    return config, quantization


def _check_family(raw: dict[str, Any], path: Path, *, trust_remote_code: bool) -> None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = raw.get("model_type")
    if name is None:
        raise WeightError(f"{path / 'config.json'} has no model_type: it names no family to build")
    if name in CONFIG_MAPPING_NAMES or (trust_remote_code and "auto_map" in raw):
        return
    if "auto_map" in raw:
        raise WeightError(
            f"{path} is of the family {name!r}, whose code it brings itself: read that code, "
            "then set "
            "model.trust_remote_code=true"
        )
    near = difflib.get_close_matches(str(name), CONFIG_MAPPING_NAMES, n=1, cutoff=0.0)
    raise WeightError(
        f"{path} is of the family {name!r}, unknown to transformers {__version__} (nearest: "
        f"{near[0]}): "
        "correct model_type in config.json or upgrade transformers"
    )


def _instantiate(config: Any, model: Model, *, dtype: torch.dtype, attention: str) -> nn.Module:
    import copy

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classification = model.task == "classification"
    if attention == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        attention = "eager"  # transformers 5.17 would leave the cap out in silence
    auto = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    own_config = copy.deepcopy(config)
    if not classification and getattr(own_config, "is_decoder", None) is False:
        # BERT and its kin are decoders only when they are told so.
        own_config.is_decoder = True
    try:
        with torch.device("meta"):
            built: nn.Module = auto.from_config(
                own_config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise WeightError(
                f"the family {config.model_type!r} has no {model.task} model in transformers: "
                "change model.task"
            ) from None
        if attention == "sdpa" and "does not support an attention implementation" in str(error):
            # BLOOM and Gemma 2 compute something between product and softmax that SDPA has no
            # place for; their eager attention is the only one.
            return _instantiate(config, model, dtype=dtype, attention="eager")
        if "attention" in str(error) or "attn" in str(error):
            raise ConfigError(f"attention={attention}: {_first_line(error)}") from None
        raise WeightError(f"{model.path}: {_first_line(error)}") from None
    _keep_in_fp32_(built, dtype)
    return built.eval()


def _keep_in_fp32_(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters that the family declares too delicate for 16 bit, as transformers' own loader
    keeps them."""
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if keep.intersection(name.split(".")):
            parameter.data = parameter.data.float()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
