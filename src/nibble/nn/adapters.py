"""LoRA and DoRA: a trained low-rank update beside a frozen linear, whatever the linear is stored
as.

    LoRA   y = W x + b + s B A dropout(x),   s = alpha / r, or alpha / sqrt(r) if rank-stabilised
    DoRA   y = b + (m / n) (W x + s B A x),  n = ||W + s B A|| by rows, a constant in backward

Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 (2312.03732), Liu et al. 2024 (2402.09353,
section 4.3). A starts uniform in +-1/sqrt(in), B at zero, m at the row norms of the base as it is
stored, so a fresh adapter changes nothing; names, shapes, scaling and the way dropout meets DoRA
are peft's, whose files `weights/adapter_files.py` reads and writes.

Of the base an adapter asks two things, `forward(x)` (of a packed one with its update, which is then
added without a tensor of its own) and, for DoRA and merging, `dense_weight`; never its format.

Costs. The update is kept in its own type (fp32) and computed in that of x: A and B are cast, x
never is. LoRA keeps x (shared with the base) and A x [tokens, r] for backward. DoRA keeps its
output once more, and in each forward makes the dense weight to take n, which it drops at once: n^2
= ||W||^2 + 2 s <B, W A^T> + s^2 <B, B A A^T> by rows, so no second matrix of that size exists. With
dropout in training, DoRA runs the base twice (on x and on dropout(x)), as peft does.

It does not know of files, devices or ranks; initial values depend only on the seed and the module's
name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nibble.errors import ConfigError
from nibble.nn.adapted import NO_CASTS, Base, Casts, LowRank, PlainBase, adapted, rescaled_rows
from nibble.nn.cast_hooks import train_in_full_
from nibble.nn.expand import Expansion
from nibble.nn.quant import QuantLinear, dense_weight, is_linear
from nibble.nn.targets import (
    classification_heads,
    head_names,
    nearest,
    replace_,
    require_all,
    tied_groups,
)
from nibble.spec.config import Adapter
from nibble.spec.names import covers, meets

ALL_LINEAR = "all-linear"
MIN_NORM = 1e-12
Put = Callable[[nn.Parameter, Tensor], None]


def _copy_(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """What `adapt_` made trainable. Parameters are counted as the model has them, not as they are
    packed."""

    kind: str
    targets: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    num_trainable: int
    num_total: int


class LoraLinear(nn.Module):
    """A linear with a low-rank update; with `magnitude` it is DoRA.

    `base`: any linear [out, in]. `lora_A` [r, in], `lora_B` [out, r], `magnitude` [out] or None,
    all trained.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base = base
        assert isinstance(base, nn.Linear | QuantLinear)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank = rank
        self.scaling = alpha / (rank**0.5 if rank_stabilised else rank)
        self.dropout = dropout
        device = next(base.parameters()).device

        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        self.lora_A = trained(rank, self.in_features)
        self.lora_B = trained(self.out_features, rank)
        self.magnitude = trained(self.out_features) if dora else None
        self.casts: Casts = NO_CASTS

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the type of x."""
        if self.magnitude is not None:
            return self._forward_dora(x, self.magnitude)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        return self._updated(x, dropped)

    def _updated(self, x: Tensor, dropped: Tensor) -> Tensor:
        """W x + b + s B A dropped, by one function with one gradient of x where the base allows."""
        if torch.is_autocast_enabled(x.device.type):
            return self._add_update(self.base(x), dropped)
        if isinstance(self.base, QuantLinear):
            y: Tensor = self.base(x, self.update(dropped))
            return y
        base = self.frozen_base()
        if base is None:
            return self._add_update(self.base(x), dropped)
        return adapted(x, [base], [self.update(dropped)])[0]

    def update(self, x: Tensor) -> LowRank:
        """What LoRA adds to the base's output, computed from x."""
        return LowRank(x, self.lora_A, self.lora_B, self.scaling, self.casts)

    def frozen_base(self) -> Base | None:
        """The base as `adapted` takes it; None where it is trained as well."""
        if isinstance(self.base, QuantLinear):
            return self.base
        is_plain = type(self.base) is nn.Linear and not self.base.weight.requires_grad
        return PlainBase(self.base) if is_plain else None  # type: ignore[arg-type]

    def _forward_dora(self, x: Tensor, magnitude: Tensor) -> Tensor:
        # m / n - 1, not m / n: near the start it is small, and bf16 rounds 1.001 to 1.
        gain = magnitude / self.weight_norm(x.dtype) - 1
        bias = self._bias()
        if self.dropout and self.training:
            # As peft: what the base adds by itself sees x, what training rescales sees dropout(x).
            y: Tensor = self.base(x)
            dropped = F.dropout(x, self.dropout)
            rescaled: Tensor = self.base(dropped)
            rescaled = rescaled if bias is None else rescaled - bias
            updated = self._add_update(torch.zeros_like(rescaled), dropped)
            return y + updated + gain.to(x.dtype) * (rescaled + updated)
        direction = self._updated(x, x)
        direction = direction if bias is None else direction - bias
        scaled = rescaled_rows(direction, gain)
        return scaled if bias is None else scaled + bias

    def _bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def _add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s B A x: one fused product, so that no second tensor of y's size is made."""
        low = F.linear(x, self.lora_A.to(x.dtype))
        flat: Tensor = torch.addmm(
            y.flatten(0, -2),
            low.flatten(0, -2),
            self.lora_B.to(x.dtype).t(),
            alpha=self.scaling,
        )
        return flat.view(y.shape)

    @torch.no_grad()
    def weight_norm(self, dtype: torch.dtype) -> Tensor:
        """||W + s B A|| of each row [out], fp32, with W as the forward pass in `dtype` sees it."""
        weight = dense_weight(self.base, dtype)
        a, b = self.lora_A.float(), self.lora_B.float()
        squared = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        crossed = (weight @ self.lora_A.to(dtype).t()).float()
        del weight
        crossed = 2 * crossed + self.scaling * (b @ (a @ a.t()))
        squared = squared + self.scaling * (b * crossed).sum(1)
        # Of a row of zeros the direction is undefined: any positive norm keeps it at zero.
        norm: Tensor = squared.clamp_min(MIN_NORM**2).sqrt()
        return norm

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B A, [out, in] in fp32: what LoRA adds to the base."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in] that computes the same without an adapter; made in fp32, then
        cast."""
        merged = dense_weight(self.base, torch.float32) + self.delta()
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(merged, dim=1).clamp_min(MIN_NORM)
            merged *= (self.magnitude.float() / norm).unsqueeze(1)
        return merged.to(dtype)

    @torch.no_grad()
    def reset_parameters_(
        self, name: str, *, generator: torch.Generator, put: Put = _copy_
    ) -> None:
        """A uniform in +-1/sqrt(in), B zero, from the generator's seed and the module's `name`
        alone.

        Drawn on the CPU in fp32, so that every device and every order of modules gives the same
        values.
        """
        key = f"{generator.initial_seed()} {name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little", signed=True)
        own = torch.Generator().manual_seed(seed)
        bound = self.in_features**-0.5
        values = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=own)
        put(self.lora_A, values)
        put(self.lora_B, values.new_zeros(self.out_features, self.rank))

    @torch.no_grad()
    def finish_loading_(self) -> None:
        """Take the magnitude from the base's rows; to be called when base, A and B have their
        values."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.weight_norm(torch.float32))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        kind = "lora" if self.magnitude is None else "dora"
        return f"{kind}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """All adapters by the name of the linear they wrap, as peft and the checkpoint call it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and attribute that a checkpoint's parameter `name` fills, seen through the
    adapters.

    Raises KeyError when there is no such module; the attribute may be absent (a QuantLinear has no
    `weight`).
    """
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise KeyError(name) from None
    if isinstance(module, LoraLinear):
        module = module.base
    return module, leaf


def reset_parameters_(model: nn.Module, *, generator: torch.Generator, put: Put = _copy_) -> None:
    """Give every adapter its initial A and B; they depend on the generator's seed and the name
    only. `put` copies a whole value into a parameter that may live elsewhere in part."""
    for name, adapter in adapters(model).items():
        adapter.reset_parameters_(name, generator=generator, put=put)


def finish_loading_(model: nn.Module) -> None:
    """Take DoRA's magnitudes from the loaded base; nothing to do for LoRA."""
    for adapter in adapters(model).values():
        adapter.finish_loading_()


def adapt_(
    model: nn.Module,
    adapter: Adapter,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    expansion: Expansion | None = None,
) -> AdapterSummary:
    """Wrap the targeted linears, unfreeze what is trained in full, freeze the rest.

    `dtype` is that of everything trained beside the base. On the meta device call
    `reset_parameters_` and `finish_loading_` once the base is there; on a loaded model both are
    done here. Kind `expand` trains the blocks that `expand_` made. Raises ConfigError for a target
    or a module to save that names nothing, or that cannot be trained.
    """
    heads = classification_heads(model)
    saved = list(dict.fromkeys([*_saved_modules(model, adapter.modules_to_save), *heads]))
    if adapter.kind == "none":
        return _train_everything_(model)
    model.requires_grad_(False)
    targets: list[str] = []
    if adapter.kind == "expand":
        assert expansion is not None, "expand_ comes before adapt_"
        for name in expansion.names:
            model.get_submodule(name).requires_grad_(True)
    else:
        targets = target_names(model, adapter.targets, exclude=saved)
        for name in targets:
            replace_(model, name, _wrapped(model.get_submodule(name), adapter, dtype))
    # Types first: casting one of two tied modules casts the other's weight as well.
    computed = {name: next(model.get_submodule(name).parameters()).dtype for name in saved}
    for name in saved:
        train_in_full_(model.get_submodule(name), dtype, compute=computed[name])
    ready = [(n, m) for n, m in adapters(model).items() if m.lora_A.device.type != "meta"]
    for name, module in ready:
        module.reset_parameters_(name, generator=generator)
        module.finish_loading_()
    return summarise(model, adapter.kind, targets, saved)


def target_names(
    model: nn.Module, patterns: Sequence[str], *, exclude: Sequence[str] = ()
) -> list[str]:
    """Names of the linears that `patterns` mean, in the model's order; none within `exclude`.

    `all-linear` is every linear but the output head and classification heads. Raises ConfigError
    for a pattern that means no linear.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    heads = head_names(model)
    found: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            met = {name for name in linears if name not in heads}
        else:
            met = {name for name in linears if meets(pattern, name)}
        if not met:
            hint = "" if linears and pattern == ALL_LINEAR else f"; {nearest(pattern, linears)}"
            raise ConfigError(f"adapter.targets: {pattern!r} names no linear layer{hint}")
        found |= met
    names = [n for n in linears if n in found and not covers(exclude, n)]
    if not names:
        raise ConfigError(
            "adapter.targets: every target lies within modules_to_save, which is trained in full; "
            "remove one of the two"
        )
    return names


def _wrapped(base: nn.Module, adapter: Adapter, dtype: torch.dtype) -> LoraLinear:
    return LoraLinear(
        base,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rank_stabilised=adapter.rank_stabilised,
        dropout=adapter.dropout,
        dora=adapter.kind == "dora",
        dtype=dtype,
    )


def _saved_modules(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that `patterns` mean, after the checks that they can be trained and
    saved."""
    names = [name for name, _ in model.named_modules() if name]
    require_all(patterns, names, option="adapter.modules_to_save")
    met = [name for name in names if any(meets(pattern, name) for pattern in patterns)]
    # The outermost one says it all.
    saved = [n for n in met if not any(n.startswith(f"{other}.") for other in met)]
    for group in tied_groups(model):
        inside = [name for name in group if covers(saved, name)]
        if inside and len(inside) < len(group):
            outside = [name.rpartition(".")[0] for name in group if name not in inside]
            raise ConfigError(
                f"adapter.modules_to_save: {inside[0].rpartition('.')[0]} shares its weight with "
                f"{', '.join(outside)}; name them all, or none"
            )
    for name in saved:
        if any(isinstance(module, QuantLinear) for module in model.get_submodule(name).modules()):
            raise ConfigError(
                f"adapter.modules_to_save: {name} is quantised and cannot be trained; "
                f"add {name.rpartition('.')[2]} to quant.keep"
            )
    return saved


def _train_everything_(model: nn.Module) -> AdapterSummary:
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if packed:
        raise ConfigError(
            f"adapter.kind=none trains the base itself, but {packed[0]} and {len(packed) - 1} "
            "others are quantised; use adapter.kind=lora or quant.format=none"
        )
    model.requires_grad_(True)
    return summarise(model, "none", [], [])


def summarise(
    model: nn.Module, kind: str, targets: Sequence[str] = (), saved: Sequence[str] = ()
) -> AdapterSummary:
    """Count what is trained and what there is, packed weights by the weights they stand for."""
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_packed, num_logical = 0, 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            num_packed += sum(t.numel() for t in module.packed().values())
            num_logical += module.out_features * module.in_features
    num_stored = sum(p.numel() for p in model.parameters())
    return AdapterSummary(
        kind=kind,
        targets=tuple(targets),
        modules_to_save=tuple(saved),
        num_trainable=num_trainable,
        num_total=num_stored - num_packed + num_logical,
    )
