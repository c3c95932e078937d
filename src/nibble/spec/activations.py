"""Bytes that a forward pass keeps for backward, tensor by tensor, for transformers' own blocks.

Idea. Autograd keeps what each operation's derivative needs, and nothing else; so the bytes follow
from the list of operations. T tokens in rows of S, hidden width h, MLP width f, H heads of d, K key
heads, e bytes a number (2 in bf16). A block keeps

    rms norm      4 h T + 4 T        its input in fp32 and one scale a token      (twice or more)
                  e h T more         the normalised input, when its weight is trained
    layer norm    e h T + 8 T        its input, mean and inverse deviation
    attention     e d T (2 H + 2 K) + 4 H T   query, key, value, output, log-sum-exp (fused kernel);
                  packed rows repeat key and value for each head: K becomes H
      eager       (4 + e) H S T      the softmax in fp32 and its copy (BLOOM; Gemma 2 also tanh)
    MLP gated     3 e f T            gate, activation, up
    MLP plain     e f T              input of the activation (gelu_new: 4 e f T)
    linears       e (in) T           their input where the weight is trained or adapted, once for
                                     all linears that read it; packed and frozen linears keep none
    LoRA          e r T: A x; around a linear of 16 bit also e r (in + out), copies of A and B in
                  type e; with dropout its own input and a mask of a byte: (e + 1) (in) T
    DoRA          e (out) T more
    dropout       h T                a byte an element

nibble's fast paths (`nn/fused.py`) keep less: of an RMS norm its input as it is (e h T), of a gated
MLP gate and up (2 e f T), of ALiBi's attention no scores. Feed-forward layers in tiles keep their
input alone. What checkpointing makes of these lists is `checkpointing.py`. Each term is compared
with what `saved_tensors_hooks` counts on real models in tests/spec/test_plan_activations.py. Not
here: tensors alive only inside an operation (`backward_bytes` bounds those), allocator rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from nibble.spec.arch import Architecture
from nibble.spec.arch_types import Parameter

FAST_PATHS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "bloom"}
    | {"gpt_neox", "gpt2"}
)
"""Model types whose blocks have fast paths (the tables of `nn/fused.py`, by family)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One pass: its tokens, and what of the model is trained.

    `element`: bytes of the compute type. `everything`: the base itself is trained;
    `trained_blocks`: only these blocks of it. `adapted`: modules with a low-rank update of `rank`;
    `cast`: copies of it in the type that it computes in are kept. `packed_rows`: several documents
    in a row.
    """

    tokens: int
    row_length: int
    element: int
    everything: bool = False
    trained_blocks: frozenset[int] = frozenset()
    embedding_trained: bool = False
    adapted: frozenset[str] = frozenset()
    rank: int = 0
    dora: bool = False
    adapter_dropout: float = 0.0
    cast: bool = True
    packed_rows: bool = False
    fused: bool = False
    """The blocks of a family in `FAST_PATHS` take them."""
    mlp_tile_tokens: int | None = None
    grows: bool = False
    """Gradients of weights come with backward and stay until the step."""
    accumulates: bool = False
    """They are added to those of passes before."""
    on_card: bool = False
    """CUDA's kernels compute; they take no groups of heads in fp32."""
    num_idle: int = 0
    """Blocks below the first trained one: nothing there waits for backward."""

    @property
    def tiled(self) -> bool:
        """Whether feed-forward layers see less than all tokens at once."""
        return self.mlp_tile_tokens is not None and self.tokens > self.mlp_tile_tokens


@lru_cache(maxsize=256)
def kept_by_blocks(shape: Architecture, work: Work) -> tuple[Mapping[str, int], ...]:
    """What each block keeps without checkpointing, by name of the tensor."""
    return tuple(kept_by_block(shape, work, block=i) for i in range(shape.sizes.num_layers))


@lru_cache(maxsize=256)
def kept_bytes(shape: Architecture, work: Work) -> tuple[int, ...]:
    """The bytes of these, block by block."""
    return tuple(sum(kept.values()) for kept in kept_by_blocks(shape, work))


@lru_cache(maxsize=4096)
def kept_by_block(shape: Architecture, work: Work, *, block: int) -> Mapping[str, int]:
    """What block number `block` keeps, by name of the tensor, in bytes.

    Remembered: a search plans hundreds of recipes of a few kinds of passes.
    """
    if block in work.trained_blocks:
        work = replace(work, everything=True)
    linears = [p for p in shape.parameters if p.block == block and p.kind == "linear"]
    kept: dict[str, int] = {}
    _add(kept, _norms(shape, work, is_first=block == 0))
    _add(kept, _attention(shape, work))
    if work.tiled and not shape.num_experts:
        linears = [linear for linear in linears if not role(linear).startswith("MLP")]
        kept["input of MLP input"] = work.element * work.tokens * shape.sizes.hidden
    else:
        _add(kept, _experts(shape, work) if shape.num_experts else _mlp(shape, work))
    _add(kept, _inputs(shape, work, linears))
    _add(kept, _low_rank(work, linears))
    if shape.style.dropout:
        kept["dropout masks"] = 2 * work.tokens * shape.sizes.hidden
    return kept


def kept_outside(shape: Architecture, work: Work) -> dict[str, int]:
    """What is kept once a pass: rotary angles, the last norm, rows of the loss and gradients."""
    tokens, hidden, e = work.tokens, shape.sizes.hidden, work.element
    kept = {"rotary angles": 2 * e * tokens * shape.sizes.head_dim, "ids": 24 * tokens}
    if not shape.style.post_norm:
        kept["last norm"] = _norm(shape, work, hidden)
    if shape.embedding_norm and (work.everything or work.embedding_trained):
        kept["embedding norm"] = _norm(shape, work, hidden)
    kept["rows of the loss and their gradient"] = 3 * e * tokens * hidden  # and where they lay
    return kept


def materialises(shape: Architecture, work: Work) -> bool:
    """Whether scores exist although attention is fused elsewhere: in fp32, with groups of heads."""
    sizes = shape.sizes
    in_groups = sizes.num_kv_heads < sizes.num_heads and not work.packed_rows
    return work.on_card and work.element == 4 and in_groups


def input_bytes(shape: Architecture, work: Work) -> int:
    """A block's input."""
    return work.element * work.tokens * shape.sizes.hidden


def attention_output_bytes(shape: Architecture, work: Work) -> int:
    """What fused attention gives: its output and a number a head and token; 0 where the scores are
    materialised, or dropped out.
    """
    if shape.style.scores != "fused" or shape.style.attention_dropout or materialises(shape, work):
        return 0
    sizes = shape.sizes
    return work.tokens * sizes.num_heads * (work.element * sizes.head_dim + 4)


def backward_bytes(shape: Architecture, work: Work, *, block: int) -> int:
    """The most that a block's backward holds: what it keeps, the largest of its operations, and
    the gradients of its own weights that have come by then (`work.grows`).

    The feed-forward layer comes first, while all is kept: its inner gradient and the last linear's;
    then, without what waited for that, those of the others. Attention follows when what the layer
    kept is gone. Each holds the gradient that comes in and the one that it makes.
    """
    kept = kept_by_block(shape, work, block=block)
    all_of_it = sum(kept.values())
    mlp = sum(kept.get(name, 0) for name in MLP_PARTS)
    passing = input_bytes(shape, work)
    weights = _weight_gradients(shape, work, block)
    inner = kept.get("input of MLP output", 0)
    norm = _norm_workspace(shape, work)
    first = all_of_it + max(_mlp_workspace(shape, work, inner), norm) + passing
    second = all_of_it - inner + weights["MLP output"] + weights["MLP input"]
    # By then the norms between have had their backward.
    norms = kept.get("norms", 0) * (shape.style.norms - 1) // max(1, shape.style.norms)
    third = all_of_it - mlp - norms + _attention_workspace(shape, work) + passing
    return max(
        first + weights["MLP output"],
        second + 2 * passing if work.grows or work.accumulates else 0,
        third + weights["MLP output"] + weights["MLP input"] + weights["attention output"],
    )


def _weight_gradients(shape: Architecture, work: Work, block: int) -> dict[str, int]:
    """Gradients of a block's linears, by what they read; 0 where they are not trained at all or do
    not stay until the step."""
    found = dict.fromkeys(
        ("MLP input", "MLP output", "attention input", "attention output", "experts"), 0
    )
    if not (work.grows or work.accumulates):
        return found
    if not (work.everything or block in work.trained_blocks):
        return found
    for parameter in shape.parameters:
        if parameter.block == block and parameter.kind in ("linear", "expert"):
            name = "experts" if parameter.kind == "expert" else role(parameter)
            nbytes = parameter.size * work.element
            # One that is added to others goes at once.
            found[name] = max(found[name], nbytes) if work.accumulates else found[name] + nbytes
    found["MLP input"] += found["experts"]
    if work.accumulates:
        found["MLP output"] = found["attention output"] = 0
    return found


MLP_PARTS = ("MLP", "router", "experts", "input of MLP input", "input of MLP output")


def _mlp_workspace(shape: Architecture, work: Work, kept_inner: int) -> int:
    """Gradients of the inner tensors; with tiles also all that a tile keeps.

    `kept_inner`: what the last linear kept of its input, which goes when its backward is done.
    """
    if work.tiled and not shape.num_experts:
        tile = replace(work, tokens=work.mlp_tile_tokens or work.tokens, mlp_tile_tokens=None)
        inner = sum(_mlp(shape, tile).values()) + tile.element * tile.tokens * shape.sizes.ffn
        return inner + _mlp_workspace(shape, tile, 0)
    width = shape.sizes.ffn * max(shape.experts_per_token, 1)
    # The fast gate writes its gradients where gate and up were.
    copies = 1 if work.fused else 3 if shape.style.gated else 2
    if work.adapter_dropout and work.adapted:
        copies += 1  # behind the last linear's dropout
    one = work.element * width * work.tokens
    return max(one, copies * one - kept_inner)


def _norm_workspace(shape: Architecture, work: Work) -> int:
    steps = work.element if work.fused else 3 * 4
    return steps * shape.sizes.hidden * work.tokens


def _attention_workspace(shape: Architecture, work: Work) -> int:
    """Gradients of output, query, key and value, and what the kernel adds up in: the query's in
    fp32, key's and value's for each of the query's heads."""
    sizes, tokens, e = shape.sizes, work.tokens, work.element
    if not stores_no_scores(shape, work):
        return (8 + e) * sizes.num_heads * work.row_length * tokens
    shared = sizes.num_kv_heads < sizes.num_heads and not work.packed_rows
    query = sizes.num_heads * (2 * e + 4 + (2 * e if shared else 0))
    return tokens * sizes.head_dim * (query + 2 * e * sizes.num_kv_heads)


def forward_bytes(shape: Architecture, work: Work) -> int:
    """The most that a block's forward holds without a graph, for evaluation."""
    sizes, tokens, e = shape.sizes, work.tokens, work.element
    seen = min(tokens, work.mlp_tile_tokens or tokens)
    mlp = (3 if shape.style.gated else 2) * e * sizes.ffn * max(shape.experts_per_token, 1) * seen
    attention = e * sizes.head_dim * (2 * sizes.num_heads + 2 * sizes.num_kv_heads) * tokens
    if not stores_no_scores(shape, work):
        attention += (4 + e) * sizes.num_heads * work.row_length * tokens
    # The block's input, the embedding's output, the residual sum and the normalised input.
    return max(mlp, attention, 2 * 4 * sizes.hidden * tokens) + 4 * e * sizes.hidden * tokens


@lru_cache(maxsize=256)
def mlp_size(shape: Architecture) -> int:
    """Weights of the feed-forward layers that may go by tiles; a mixture's may not."""
    rows = () if shape.num_experts else shape.linears
    return sum(p.size for p in rows if p.block is not None and role(p).startswith("MLP"))


def role(parameter: Parameter) -> str:
    """Which tensor a linear of a block reads: the input or output of attention or MLP."""
    parts = parameter.module.split(".")
    leaf, path = parts[-1], ".".join(parts[-3:])
    if "attn" in path or "attention" in path:
        is_last = leaf in ("o_proj", "out_proj", "dense", "c_proj", "attn_output")
        return "attention output" if is_last else "attention input"
    is_last = leaf in ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "ffn_down", "w2")
    return "MLP output" if is_last or path.endswith(".output.dense") else "MLP input"


def is_last(parameter: Parameter) -> bool:
    """Whether it is the weight of a block's last linear."""
    return parameter.kind == "linear" and role(parameter) == "MLP output"


def _add(kept: dict[str, int], more: dict[str, int]) -> None:
    for name, nbytes in more.items():
        if nbytes:
            kept[name] = kept.get(name, 0) + nbytes


def _norm(shape: Architecture, work: Work, width: int, *, rows: int = 1) -> int:
    """One norm over `rows` vectors of `width` for each token."""
    size, kind = work.tokens * width * rows, shape.style.norm
    if kind == "layer":
        return work.element * size + 8 * work.tokens * rows
    if work.fused:
        return work.element * size
    kept = 4 * size + 4 * work.tokens * rows
    if kind == "rms_fp32":
        kept += 4 * width
    if work.everything:
        kept += size * (4 if kind == "rms_fp32" else work.element)
    return kept


def _norms(shape: Architecture, work: Work, *, is_first: bool) -> dict[str, int]:
    style, sizes = shape.style, shape.sizes
    one = _norm(shape, work, sizes.hidden)
    total = style.norms * one
    if style.shared_norm_input:
        total -= work.element * work.tokens * sizes.hidden
    if is_first and not style.post_norm and not work.everything and not work.embedding_trained:
        # Nothing before the first adapter needs a gradient, so its norms keep nothing.
        total = 0 if style.shared_norm_input else total - one
    kept = {"norms": total}
    if style.qk_norm:
        kept["query and key norms"] = _norm(
            shape, work, sizes.head_dim, rows=sizes.num_heads
        ) + _norm(shape, work, sizes.head_dim, rows=sizes.num_kv_heads)
    return kept


def stores_no_scores(shape: Architecture, work: Work) -> bool:
    """Whether attention is one kernel: torch's, or on the fast path our own for ALiBi."""
    style = shape.style
    alibi = style.scores == "eager" and work.fused and not style.attention_dropout
    return style.scores == "fused" or alibi


def _attention(shape: Architecture, work: Work) -> dict[str, int]:
    sizes, style, tokens, e = shape.sizes, shape.style, work.tokens, work.element
    one = e * tokens * sizes.head_dim
    query = one * sizes.num_heads
    key = one * (sizes.num_heads if work.packed_rows else sizes.num_kv_heads)
    kept = {"query": query, "key": key, "value": key}
    if stores_no_scores(shape, work):
        if style.projection == "fused_rotated" and not work.packed_rows:
            kept["value"] = query + 2 * key  # a view keeps the whole projection alive
        kept["attention"] = query + 4 * sizes.num_heads * tokens
        if materialises(shape, work):
            kept["key"] = kept["value"] = query
            kept["scores"] = 4 * sizes.num_heads * work.row_length * tokens
        return kept
    scores = sizes.num_heads * work.row_length * tokens
    kept["key"] = kept["value"] = query
    kept["scores"] = 4 * scores + (e * scores if e != 4 else 0)
    if style.scores == "softcap":
        kept["scores"] += e * scores
    if style.attention_dropout:
        kept["scores"] += (1 + e) * scores
    return kept


def _mlp(shape: Architecture, work: Work) -> dict[str, int]:
    wide = work.element * work.tokens * shape.sizes.ffn
    if not shape.style.gated:
        return {"MLP": (1 if work.fused else shape.style.activation_copies) * wide}
    if work.fused:
        return {"MLP": 2 * wide}
    return {"MLP": (2 + shape.style.activation_copies) * wide}


def _experts(shape: Architecture, work: Work) -> dict[str, int]:
    """A mixture: every token visits k experts; its copies are grouped by expert."""
    sizes, tokens, e, k = shape.sizes, work.tokens, work.element, shape.experts_per_token
    copies = tokens * k
    kept = {
        "router": tokens * (4 * shape.num_experts + 4) + copies * (8 + 4 + 8 + 8 + 8 + 4),
        "experts": e * copies * (3 * sizes.ffn + sizes.hidden),
    }
    if work.everything:
        kept["experts"] += e * copies * (sizes.hidden + sizes.ffn)
    return kept


def _inputs(shape: Architecture, work: Work, linears: Iterable[Parameter]) -> dict[str, int]:
    """Inputs of linears that are trained or adapted, once for all that read the same tensor."""
    widths: dict[str, int] = {}
    for linear in linears:
        drops = linear.module in work.adapted and work.adapter_dropout > 0
        if work.everything or (linear.module in work.adapted and not drops):
            widths[role(linear)] = linear.matrix[1]
    if work.everything and shape.num_experts:
        widths["MLP input"] = shape.sizes.hidden  # the router's
    if stores_no_scores(shape, work) and (
        work.packed_rows or work.fused or not shape.style.copied_output
    ):
        widths.pop("attention output", None)  # the kernel keeps it already
    if shape.style.shared_norm and len({"attention input", "MLP input"} & set(widths)) == 2:
        widths.pop("MLP input")
    return {f"input of {name}": work.element * work.tokens * w for name, w in widths.items()}


def _low_rank(work: Work, linears: Iterable[Parameter]) -> dict[str, int]:
    kept = {"low-rank": 0, "low-rank copies": 0, "dropped inputs": 0, "DoRA outputs": 0}
    for linear in linears:
        if linear.module not in work.adapted:
            continue
        out, inside = linear.matrix
        kept["low-rank"] += work.element * work.tokens * work.rank
        if work.cast:
            kept["low-rank copies"] += work.element * work.rank * (inside + out)
        if work.adapter_dropout:
            kept["dropped inputs"] += (work.element + 1) * work.tokens * inside
        if work.dora:
            kept["DoRA outputs"] += work.element * work.tokens * out
    return kept
