"""The recipe: every word that a run is made of, typed and frozen.

A recipe is values, not behaviour: format x adapter x optimiser x placement are four independent
sections, and what cannot be combined is refused in `spec/rules.py` before anything is loaded.
`spec/load.py` reads YAML and overrides and translates other trainers' words (`spec/aliases.py`);
this module holds the words themselves. The text under each field is its documentation: `nibble
recipes --fields` and docs/recipe.md are made from it.

No torch here: validating a recipe takes milliseconds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

MODEL_CONFIG = ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
)

FormatName = Literal["none", "nf4", "fp4", "int8", "hqq", "ternary"]
AdapterKind = Literal["none", "lora", "dora", "expand", "factorised"]
OptimizerName = Literal["adamw", "adamw8bit", "sgd", "adafactor", "adafactor-momentum", "lion"]
MethodName = Literal[
    "none", "galore", "galore8bit", "q-galore", "fira", "balanced", "apollo", "apollo-mini"
]
ScheduleName = Literal["constant", "linear", "cosine"]
DataFormat = Literal[
    "auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text", "classification"
]
Task = Literal["causal-lm", "classification"]
Precision = Literal["bf16", "fp32", "fp16"]
SinkName = Literal["progress", "plain", "tensorboard", "wandb"]
FitWord = Literal["format", "optimizer", "method", "rank"]
PlacementName = Literal["auto", "single", "ddp", "fsdp", "stream", "dp", "deepspeed"]


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = MODEL_CONFIG


class Model(Section):
    """Which model, and how its code and tokenizer are found."""

    path: str
    """A folder, a .gguf file, a hub id such as `meta-llama/Llama-3.1-8B`, or a shape to pretrain:
    builtin:llama-9m, 35m, 60m, 130m, 250m, 350m, 1b, 3b, 7b, 13b."""
    revision: str | None = None
    """Hub revision (branch, tag or commit). Only for hub ids."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if it does not lie with the model; builtin:bytes takes
    bytes (default of a built-in shape: t5-base of the hub)."""
    task: Task = "causal-lm"
    """`causal-lm`, or `classification` of whole sequences (GLUE)."""
    num_labels: int | None = Field(default=None, ge=1)
    """Classes of a classification head; 1 is regression. Taken from the data when not given."""
    from_scratch: bool = False
    """Initialise the weights at random from config.json instead of reading them."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Rows of a random embedding and head (default: config.json's; of a built-in shape the
    tokenizer's, rounded up)."""
    trust_remote_code: bool = False
    """Run model code that the checkpoint brings. Off unless you say so."""


class Quant(Section):
    """How the frozen base weights are stored."""

    format: FormatName = "none"
    """`none` keeps 16 bit. nf4, fp4: QLoRA. int8: LLM.int8. hqq: 1, 2, 3, 4 or 8 bits. ternary:
    {-1, 0, 1}."""
    bits: Literal[1, 2, 3, 4, 8] | None = None
    """Only for hqq (default 4): the others have one width."""
    block: int | None = Field(default=None, ge=16)
    """Weights that share a scale, within one row (default 64; for nf4, fp4, hqq)."""
    double_quant: bool | None = None
    """nf4, fp4: store the scales in 8 bits as well (default true; saves 0.37 bit a weight)."""
    int8_threshold: float | None = Field(default=None, ge=0)
    """int8: input columns with a value above this are multiplied in 16 bit (default 6.0; 0 turns it
    off)."""
    keep: tuple[str, ...] = ()
    """Linears that stay in 16 bit, by name or regular expression, besides the output head."""
    kernels: Literal["auto", "eager", "triton", "bitsandbytes"] = "auto"
    """Who unpacks: `auto` takes the fastest present; `eager` is the reference."""
    cache: bool = True
    """Keep the packed base on disk, so that the next start reads it instead of packing again."""


class Adapter(Section):
    """What is trained beside the base. `none` trains the base itself."""

    kind: AdapterKind = "none"
    """`lora`, `dora`, `expand` (LLaMA-Pro: new identity blocks), `factorised` (W = B A alone, from
    scratch), or `none` for full training."""
    rank: int = Field(default=16, ge=1)
    """Rank r of the update B A."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) when rank_stabilised)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rank_stabilised: bool = False
    """rsLoRA (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("all-linear",)
    """`all-linear` (all but the output head), module names such as q_proj, or regular
    expressions."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, such as embed_tokens or lm_head."""
    num_new_blocks: int = Field(default=4, ge=1)
    """expand: how many blocks are added, spread evenly."""
    path: str | None = None
    """Start from this saved adapter (a peft folder) instead of a fresh one."""


class Source(Section):
    """One data source."""

    path: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .txt file (also .xz, .gz, .bz2), a folder of them,
    or a hub data set."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Split of a hub data set (default train)."""
    format: DataFormat = "auto"
    """`auto` looks at the columns of the first rows and says what it found."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Rename columns: {field of the format: column in the file}."""
    template: str | None = None
    """A prompt with {column} placeholders, instead of the format's own."""
    num_rows: int | None = Field(default=None, ge=1)
    """Use only the first rows."""


class Data(Section):
    """What is learnt, and from which of its tokens."""

    train: tuple[Source, ...] = ()
    """Training sources, concatenated. A plain string is taken as a path."""
    eval: tuple[Source, ...] = ()
    """Held-out sources."""
    eval_rows: int | None = Field(default=None, ge=1)
    """Hold out this many rows of train instead (chosen by seed)."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens in a row."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to rows longer than max_length; they are counted and named either way."""
    packing: bool = False
    """Several documents in a row of max_length; attention never crosses from one to another."""
    loss_on: Literal["answers", "all"] = "answers"
    """Train on the answers (and the token that ends each), or on every token."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    system: str | None = None
    """A system message put before conversations that have none."""
    shuffle: bool = True
    """New order each epoch, a pure function of seed and epoch."""
    streaming: bool = False
    """Read and tokenise texts while training, joined end to end and cut into rows of max_length:
    for data that should not be tokenised beforehand."""
    eval_tokens: int | None = Field(default=None, ge=1)
    """streaming: how much is held out, of data.eval, or else the beginning of data.train (default
    1,000,000 with data.eval)."""
    cache_dir: str | None = None
    """Where tokenised rows are kept, addressed by content (default: the user's cache folder)."""


class Optim(Section):
    """The update rule and its schedule."""

    name: OptimizerName = "adamw"
    """adamw, adamw8bit (block-wise 8-bit states), sgd, adafactor (also with the first moment),
    lion."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; never on biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw, adamw8bit, lion; of adafactor-momentum the first."""
    eps: float = Field(default=1e-8, gt=0)
    """adamw, adamw8bit, adafactor, adafactor-momentum."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """sgd only."""
    schedule: ScheduleName = "cosine"
    """constant, linear or cosine, after the warm-up."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps from 0 to the peak; or give warmup_ratio."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """The same as a share of all steps."""
    floor_ratio: float = Field(default=0.0, ge=0, le=1)
    """The schedule ends at this share of the peak."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Global clipping; null turns it off."""
    restart_every: int | None = Field(default=None, ge=1)
    """ReLoRA: every so many updates merge LoRA into the base and begin it anew."""
    restart_warmup_steps: int = Field(default=50, ge=0)
    """Updates over which the rate comes back after a restart."""
    state: Literal["fp32", "bf16", "8bit"] | None = None
    """How the rule's state is stored (default: as name or method says, else fp32)."""
    method: MethodName = "none"
    """Low-rank gradients: galore, galore8bit, q-galore (8-bit states, int4 bases, lazy), fira,
    balanced, apollo, apollo-mini. A row of values for the settings below; what is given there
    wins."""
    rank: int | None = Field(default=None, ge=1)
    """Rank of the projected gradients (default 128 with a method; apollo-mini 1). A rank without a
    method: a randomised basis, scale 1."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Steps between new bases (default 200)."""
    scale: float | None = Field(default=None, gt=0)
    """Multiplies projected updates (galore, q-galore, and fira and balanced, whose rest it leaves
    alone: 0.25)."""
    side: Literal["std", "reverse_std", "left", "right", "full"] | None = None
    """Which side of a matrix is projected: std the smaller, reverse_std the larger."""
    basis: Literal["svd", "randomised", "random", "seeded"] | None = None
    """Where bases come from: the gradient's svd, a sketch of it, or a seed (seeded: never
    stored)."""
    basis_storage: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """How bases are stored (default fp32; q-galore int4)."""
    residual: Literal["none", "fira", "channel", "tensor", "balanced"] | None = None
    """What is added of the gradient outside of the basis, or scaled by channel or tensor."""
    norm_growth: float | None = Field(default=None, ge=0)
    """Bound on the growth of the residual's norm from step to step (default 1.01; 0: none)."""
    stagger: bool | None = None
    """Spread the refreshes over the steps between them (default true)."""
    lazy_threshold: float | None = Field(default=None, ge=0, lt=1)
    """Refresh a basis half as often once successive ones are this similar (q-galore 0.4)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Which matrices are projected: `all-linear` (all but embeddings and heads), names of
    parameters or modules, or regular expressions."""
    layerwise: bool = False
    """Keep only projected gradients: none of a projected matrix outlives its layer's backward."""
    in_backward: bool = False
    """Step matrices in backward and keep no gradient of them: without clipping and accumulation."""
    weights: Literal["float", "int8"] = "float"
    """Projected weights as floats, or as int8 with scales and stochastic rounding (Q-GaLore)."""


class Profile(Section):
    """torch.profiler for a few steps: a trace and a memory timeline in RUN/profile."""

    start_step: int = Field(default=3, ge=1)
    """First profiled step."""
    num_steps: int = Field(default=2, ge=1)
    """How many."""
    memory: bool = True
    """Also record the allocator's history (CUDA)."""


class Train(Section):
    """The loop."""

    precision: Precision = "bf16"
    """Compute type. fp16 scales the loss. Trained weights are kept in fp32 with fp16, else in this
    type."""
    adapter_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the adapters' weights (auto: fp32, which costs little and loses no small update)."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows in one pass of one device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Passes in one update. Weighted by tokens: k passes equal one large one."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; or give max_steps or max_tokens."""
    max_steps: int | None = Field(default=None, ge=1)
    """Updates; wins over epochs."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on, a budget instead of epochs or max_steps; rounded up to whole steps."""
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    """`full` keeps each block's input and computes the rest again in backward; `selective` also
    keeps what is dear to compute and small (attention's output); `none` keeps all."""
    keep_blocks: NonNegativeInt | Literal["auto"] = 0
    """With checkpointing: this many blocks, the last ones, keep all they computed; `auto`: as many
    as the memory allows."""
    activation_offload: bool = False
    """Move the blocks' inputs to pinned host memory until backward, behind the computation."""
    mlp_tile_tokens: int | None = Field(default=None, ge=128)
    """Compute feed-forward layers for this many tokens at a time, for very long rows."""
    fused_kernels: bool = True
    """Norms, rotary embeddings, feed-forward gates and adapters in fused steps, for families that
    have them; false runs transformers' own code."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay micro-batches of a known shape as CUDA graphs, without Python between kernels; rows
    that are not packed are padded to few lengths; `auto`: on one GPU, or with ddp, where the plan
    says that the host needs 75 % of the GPU's time for a pass, and that there is memory for it."""
    loss_chunk_tokens: int = Field(default=1024, ge=16)
    """Logits are made for this many tokens at a time."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; there is always one before and one after when there is held-out
    data."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; there is always one at the end and at Ctrl-C."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many are kept."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines in the sinks; metrics.jsonl has every step."""
    seed: int = Field(default=0, ge=0)
    """Of initialisation, data order and dropout."""
    profile: Profile | None = None
    """Profile a few steps."""


class Place(Section):
    """Where tensors live."""

    kind: PlacementName = "auto"
    """single: one device. ddp: a copy on each. fsdp: weights sharded over all. stream: frozen
    weights once in host memory, pulled block by block by each device. dp: one process, several
    GPUs. deepspeed: ZeRO by that library. auto: single, or ddp with several devices."""
    device: str = "auto"
    """auto (GPUs where there are some), cpu, cuda or cuda:N."""
    num_devices: int | None = Field(default=None, ge=1)
    """Devices of each machine, one process each (default: all GPUs; on a CPU one process)."""
    vram: str | None = None
    """Cap of each GPU's memory such as 24GiB: enforced, so that a wrong plan fails at once."""
    ram: str | None = None
    """Budget of host memory of one machine; a run that plans more is refused."""
    shard: Literal["full", "grad-op", "hybrid"] = "full"
    """fsdp: free a block's weights after each use, keep them from forward to backward, or shard
    within groups of `shard_group` and replicate across them."""
    shard_group: int | None = Field(default=None, ge=2)
    """fsdp hybrid: processes that share one copy (default: those of one machine)."""
    zero_stage: Literal[2, 3] = 3
    """deepspeed: 2 shards gradients and optimiser state, 3 the weights too."""
    resident_blocks: NonNegativeInt | Literal["auto"] = "auto"
    """stream: blocks whose weights stay on the device (auto: as many as memory allows)."""
    ring_blocks: int = Field(default=3, ge=2)
    """stream: buffers on the device that blocks are pulled into."""
    timeout_s: float = Field(default=600.0, gt=0)
    """A process that waits longer for another ends the run and names the step."""


class Fit(Section):
    """What `fit: auto` chooses, for the most tokens a second within the memory."""

    allow: tuple[FitWord, ...] = ()
    """Choices that change what is learnt, made only when named: format (none, int8, nf4), optimizer
    (8-bit states), method (layer-wise GaLore where all is trained), rank (lower, as far as needed
    for anything to fit)."""
    batch_rows: int | None = Field(default=None, ge=1)
    """Rows of one update over all devices, to be split into micro-batches and passes (default: as
    many as the recipe has)."""
    fixed: tuple[str, ...] = ()
    """Settings that stay as they are. Those that you give are added when the recipe is read."""


class Report(Section):
    """Where progress goes. metrics.jsonl is always written."""

    sinks: tuple[SinkName, ...] = ("progress",)
    """progress (a live view on a terminal, plain lines elsewhere), plain, tensorboard, wandb."""
    project: str = "nibble"
    """wandb project."""
    run_name: str | None = None
    """wandb run name (default: the run folder's)."""


class Export(Section):
    """What `nibble export` may write."""

    max_divergence: float = Field(default=0.05, gt=0)
    """Refuse above this mean KL divergence (nats a token) between the exported and the trained
    model."""


class Recipe(Section):
    """One run."""

    model: Model
    """The base model."""
    data: Data = Data()
    """The data."""
    quant: Quant = Quant()
    """Storage of the frozen base."""
    adapter: Adapter = Adapter()
    """What is trained."""
    optim: Optim = Optim()
    """How it is updated."""
    train: Train = Train()
    """The loop."""
    place: Place = Place()
    """Devices."""
    fit: Fit | None = None
    """`auto`: nibble chooses placement, micro-batch and how activations are kept, as far as you do
    not give them; or a mapping of the settings below."""
    report: Report = Report()
    """Progress and logs."""
    export: Export = Export()
    """Exports."""
    output_dir: str = "runs/nibble"
    """The run folder."""
