"""The run file: pydantic classes that define every key of the YAML file that describes a run.

    run = load_run_file("launch/configs/quickstart.yaml", ["train.optimizer.lr=3e-4"])      # loading.py -> RunFile

The run file contains everything that can change the loss. The DeepSpeed JSON (deepspeed_json.py) sets how memory and
network are used. Every key has a description here, and `packspeed schema --markdown` writes them to docs/run_file.md.
`--set key.path=value` overrides the YAML file, which overrides the defaults. The objects are frozen. Loading a file
takes 0.1 s and does not import torch.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from packspeed.data.batch_sizes import BatchSizes
from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.fp8 import fp8_obstacle
from packspeed.launch.config.json_types import JsonObject
from packspeed.model.config import PRESETS, GPTConfig, RopeType


class Section(BaseModel):
    """Base class of all sections of the run file. Its objects are frozen; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


NO_PIPELINE = (
    "Packspeed has no pipeline parallelism. DeepSpeed's works with ZeRO-0 and 1 only, clips each stage by its "
    "own norm at ZeRO-0, and names weights by stage, so that a checkpoint can be loaded only with the number of stages "
    "that saved it. To divide a model among ranks, use ZeRO-3 (deepspeed: zero3); to divide long rows, use "
    "parallel.sequence"
)

# One description per field of GPTConfig, a dataclass without descriptions. A test checks that no field is missing.
MODEL_KEYS = {
    "n_layer": "Number of transformer blocks.",
    "n_head": "Number of attention (query) heads.",
    "d_model": "Width of the residual stream, in channels.",
    "vocab_size": "Number of tokens in the vocabulary. Default: that of the dataset's tokenizer. The weights are "
    "padded to a multiple of 128 rows; the padding never changes the loss.",
    "max_seq_len": "Longest sequence in tokens: the number of rows of a learned position table, and the longest "
    "context when generating text. Default: data.seq_len.",
    "n_kv_head": "Number of key-value heads. If it is smaller than n_head, attention is grouped-query attention. "
    "Default: n_head.",
    "head_dim": "Channels per attention head. Default: d_model / n_head.",
    "d_ff": "Hidden channels of the MLP. Default: 4 d_model; for swiglu 8/3 d_model, rounded up to a multiple of 256.",
    "norm": "Normalisation before attention, before the MLP and before the output head.",
    "norm_eps": "Number added to the variance in every norm, to avoid a division by zero.",
    "position": "Position encoding: a learned table, or rotary embeddings (RoPE) of queries and keys.",
    "rope_theta": "Base of RoPE's frequencies (theta). Unused with learned positions.",
    "rope_scaling": "How RoPE is stretched to a longer context. The keys are those of transformers' config.json.",
    "sliding_window": "Largest number of tokens that a token attends to, itself included. The cost of attention "
    "then grows with the length of a sample, and not with its square. Default: all earlier tokens.",
    "sliding_window_pattern": "Every n-th layer attends to all earlier tokens, the others have the window, as in "
    "Gemma 3. Default: all layers have it.",
    "max_window_layers": "The first n layers attend to all earlier tokens, the others have the window, as in Qwen2.",
    "mlp": "Activation of the MLP. gelu_tanh is GPT-2's approximation of gelu. swiglu has a third weight matrix. "
    "relu2 is the square of ReLU, which trains small models faster.",
    "bias": "Which layers have a bias. true: all linear layers and LayerNorm. false: none. qkv: only the projections "
    "to queries, keys and values (as in Qwen2). attention: these and attention's output projection.",
    "n_expert": "Experts per layer. They replace the MLP, and a router sends each token to n_expert_active of them, "
    "without dropping any (docs/moe.md). Default: none, that is, a dense model.",
    "n_expert_active": "Number of experts to which the router sends each token.",
    "n_shared_expert": "Experts that every token uses in addition. They are one MLP of n_shared_expert * d_expert "
    "hidden channels.",
    "d_expert": "Hidden channels of one expert. Default: d_ff or its default.",
    "first_dense": "The first n layers have a dense MLP (of d_ff hidden channels) instead of experts.",
    "gate": "How the router turns logits into scores: sigmoid for each expert alone (DeepSeek-V3), or softmax over all "
    "experts (Mixtral, Qwen3). Computed in fp32 in every precision.",
    "gate_normalised": "Divide the scores of a token's experts by their sum.",
    "gate_scale": "Factor by which the weights of a token's experts are multiplied (DeepSeek's routed_scaling_factor).",
    "balance_rate": "How far each step moves the biases that balance the experts. A bias only decides which experts a "
    "token uses. Biases follow the token counts of the global batch, so they depend neither on ranks nor on micro "
    "batches. 0: no balancing, which an export as Mixtral or Qwen3-MoE needs.",
    "qk_norm": "Apply RMSNorm to the query and the key of each head.",
    "attention_gate": "Multiply the output of attention by the sigmoid of a linear function of its input, so that a "
    "token can ignore all others. headwise: one factor per head; cannot be exported. elementwise: one factor per "
    "channel, as in Qwen3-Next. Default: no gate.",
    "value_residual": "Mix the values of the first layer into those of every later layer, with two learned factors per "
    "layer that start at 1/2 (ResFormer). Cannot be exported.",
    "value_embeddings": "n: the last layer, and every n-th layer before it, add an embedding of each token to its "
    "value (2 in nanochat). Each of these layers has its own table of vocab_size rows. Cannot be exported.",
    "logit_softcap": "Limit c of the logits: they become c * tanh(logits / c), as in Gemma 2. Default: no limit.",
    "zero_init_proj": "Start the layers whose output is added to the residual stream at 0, so that every block begins "
    "as the identity. Changes the initial weights only.",
    "tie_embeddings": "Use the token embedding as the weight of the output head.",
    "residual_scale": "Multiply what attention and MLP add to the residual stream by a learned factor for each "
    "channel, which starts at 1 (LayerScale). Cannot be exported.",
    "mup": "Scale initial weights, learning rates and the forward pass by width and depth (muP, CompleteP). The best "
    "learning rate of a small model then stays the best of a large one (docs/recipes.md). Needs adamw or lion.",
    "mtp": "Extra heads that predict the tokens after the next one, in training only. Each is one more block with the "
    "input of the last block (model/mtp.py). `loss` and validation loss stay those of the next token. Generation and "
    "export leave the heads out.",
    "dropout": "Dropout probability after the embedding and on both residual branches, in training only. The masks "
    "depend only on the seed and on the sample's position in the run, so a resumed run uses the same masks.",
    "z_loss": "Coefficient of the term log(sum exp logits)^2 that is added to the training loss of each token. PaLM "
    "used 1e-4.",
    "activation_checkpointing": "Recompute activations in the backward pass to save memory: none, full (in every "
    "block), or n (in every n-th block). full needs about a third more compute.",
    "activation_offload": "Keep the inputs of recomputed blocks in host memory until the backward pass. A GPU then "
    "holds two of them instead of one per block. Needs activation_checkpointing.",
    "mlp_chunk": "Tokens that an MLP processes at a time. The backward pass computes each chunk again, so that hidden "
    "channels exist for one chunk only. Costs one more forward pass of the MLPs. Default: all tokens at once.",
    "kernels": "Implementation of attention, norms and loss. auto: Triton on GPUs and C++ on CPUs if they can be "
    "built, otherwise PyTorch. Their results agree to 1e-5.",
}


class RopeScalingSection(Section):
    """How RoPE is stretched to a longer context. The keys are those of rope_scaling in transformers' config.json."""

    rope_type: RopeType = Field(
        description="linear: divide all angles by factor. dynamic: grow theta with the length of the text, but only "
        "beyond max_seq_len, that is, when generating. yarn: divide low frequencies only. llama3: Llama 3.1's rule."
    )
    factor: float = Field(ge=1, description="Factor by which the context becomes longer.")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="Context length in tokens before it is stretched. Required by yarn and llama3."
    )
    attention_factor: float | None = Field(
        None, gt=0, description="yarn: multiplies cosines and sines. Default: 0.1 ln(factor) + 1."
    )
    beta_fast: float | None = Field(
        None,
        gt=0,
        description="yarn: keep frequencies that make this many rotations or more over the original context. "
        "Default: 32.",
    )
    beta_slow: float | None = Field(
        None,
        gt=0,
        description="yarn: frequencies that make at most this many rotations over the original context are "
        "divided by `factor`. "
        "Default: 1.",
    )
    mscale: float | None = Field(
        None,
        gt=0,
        description="yarn: with mscale_all_dim, the default of attention_factor becomes "
        "(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).",
    )
    mscale_all_dim: float | None = Field(
        None, gt=0, description="yarn: used only together with mscale, in the denominator of its formula."
    )
    truncate: bool | None = Field(
        None,
        description="yarn: round the two ends of the ramp between kept and divided frequencies to whole channels. "
        "Default: true.",
    )
    low_freq_factor: float | None = Field(
        None,
        gt=0,
        description="llama3: frequencies that make at most this many rotations over the original context are "
        "divided by `factor`. "
        "Required.",
    )
    high_freq_factor: float | None = Field(
        None,
        gt=0,
        description="llama3: keep frequencies that make this many rotations or more over the original context. "
        "Required.",
    )


class MuPSection(Section):
    """muP: the shape of the small model for which the learning rate and the other settings of this run were tuned."""

    base_width: int = Field(
        ge=1, description="Width (model.d_model) of the small model with which settings were tuned."
    )
    base_depth: int | None = Field(
        None,
        ge=1,
        description="Layers (model.n_layer) of the small model with which settings were tuned. Default: do not scale "
        "by depth.",
    )
    base_head_dim: int | None = Field(
        None,
        ge=1,
        description="Channels per head (model.head_dim) of the small model with which settings were tuned. If given, "
        "attention logits are divided by model.head_dim / sqrt(base_head_dim) and not by sqrt(model.head_dim). Needed "
        "only if base_head_dim is not model.head_dim.",
    )


class MTPSection(Section):
    """Extra heads that predict the tokens after the next one in training."""

    depth: int = Field(
        ge=1, description="Number of extra heads. Head k predicts the token k places after the next one."
    )
    weight: float = Field(
        0.3,
        gt=0,
        description="Weight of the mean of the heads' losses; the next token's loss has the weight 1. DeepSeek-V3 used "
        "0.3 and later 0.1.",
    )


def _model_section() -> type[Section]:
    """Create the class of the section `model`: a preset, any fields of GPTConfig, or both (a field overrides the
    preset).
    """
    hints = {**typing.get_type_hints(GPTConfig), "rope_scaling": RopeScalingSection, "mup": MuPSection}
    hints |= {"mtp": MTPSection}
    fields: JsonObject = {
        f.name: (Union[hints[f.name], None], Field(None, description=MODEL_KEYS[f.name]))  # noqa: UP007
        for f in dataclasses.fields(GPTConfig)
    }
    preset = Annotated[
        str | None,
        Field(
            description="Take the layers, widths and heads of a published model; other keys override it: "
            f"{', '.join(PRESETS)}."
        ),
    ]
    section = create_model("ModelSection", __base__=Section, preset=(preset, None), **fields)
    section.__doc__ = "The shape of the model: a preset, any of the other keys, or both (a key overrides the preset)."
    return section


ModelSection = _model_section()


class SourceSection(Section):
    """One dataset of a mixture."""

    path: str = Field(description="Folder or URL of a prepared dataset.")
    weight: float = Field(1.0, ge=0, description="Share of the samples, relative to the weights of the other sources.")


class StageSection(Section):
    """New weights of the sources, used from some point of the run on."""

    from_tokens: float = Field(
        gt=0,
        description="Number of trained tokens after which the weights apply, rounded up to a multiple of 4,096 "
        "samples.",
    )
    weights: list[float] = Field(description="One weight for each source, in the order of data.sources.")


class DataSection(Section):
    """Which tokens the run reads, and how they are cut into samples."""

    path: str | None = Field(None, description="Folder or URL of a dataset written by packspeed prepare.")
    sources: list[SourceSection] | None = Field(
        None, min_length=1, description="Datasets of a weighted mixture. Give either this or data.path."
    )
    stages: list[StageSection] = Field(
        [], description="Changes of the sources' weights during the run, in ascending order of from_tokens."
    )
    seq_len: int = Field(
        ge=1,
        description="Tokens per sample. A sample reads seq_len + 1 tokens, because the targets are the inputs shifted "
        "by one.",
    )
    shuffle: Literal["blocks", "full"] = Field(
        "blocks",
        description="Order of the samples in an epoch. full: a random permutation of all samples. blocks: blocks of "
        "neighbouring samples in random order, and the samples of each block in random order. blocks reads the disk "
        "almost sequentially.",
    )
    packing: Literal["stream", "best_fit", "bos_aligned"] = Field(
        "stream",
        description="How documents fill samples. stream: join all documents and cut the tokens into windows. best_fit: "
        "pack complete documents into samples, with a little padding. bos_aligned: every sample starts with the "
        "beginning of a document, and tokens that do not fit are discarded.",
    )
    document_mask: bool = Field(
        False,
        description="Restrict the attention of each token to its own document. best_fit and bos_aligned always do so.",
    )
    cache_dir: str = Field("~/.cache/packspeed", description="Folder that caches shards read from URLs.")
    cache_gb: float = Field(100.0, gt=0, description="Largest size of the cache, in GB (1e9 bytes).")

    @model_validator(mode="after")
    def _one_place(self) -> DataSection:
        """Raise ValueError unless exactly one of path and sources is given and each stage has a weight per source."""
        if (self.path is None) == (self.sources is None):
            raise ValueError("give exactly one of data.path and data.sources")
        if any(len(stage.weights) != len(self.sources or []) for stage in self.stages):
            raise ValueError(f"a stage of data.stages needs one weight for each of {len(self.sources or [])} sources")
        return self

    @property
    def paths(self) -> list[str]:
        """Return the path or URL of every dataset that the run reads, in the order of the run file."""
        return [self.path] if self.path is not None else [source.path for source in self.sources or []]


class OptimizerSection(Section):
    """AdamW, Lion, or Muon for the hidden matrices with AdamW for the rest. Weight decay applies to matrices only."""

    name: Literal["adamw", "muon", "lion"] = Field(
        "adamw", description="The optimizer. muon updates hidden matrices with Muon and everything else with AdamW."
    )
    lr: float = Field(6e-4, ge=0, description="Peak learning rate, reached after warm-up.")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="Decay rates of the running means of the gradient and of its square, per step."
    )
    eps: float = Field(1e-8, gt=0, description="Number added to the denominator of AdamW's update. Lion has none.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled weight decay: each step shrinks matrices by the factor 1 - lr * weight_decay."
    )
    weight_decay_schedule: Literal["constant", "lr"] = Field(
        "constant",
        description="How the weight decay changes during the run. constant: weight_decay in every step. lr: "
        "weight_decay * lr / (peak lr), so that it falls with the learning rate. A step multiplies the weights by "
        "1 - lr * (this weight decay).",
    )
    embedding_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the token and position embeddings. Default: optimizer.lr."
    )
    head_lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of an output head that is not tied to the embedding. Default: optimizer.lr.",
    )
    scalar_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of norms and biases. Default: optimizer.lr."
    )
    muon_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the matrices that Muon updates. Default: optimizer.lr."
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Momentum of Muon. Unused by adamw and lion.")
    momentum_warmup_steps: int = Field(
        0,
        ge=0,
        description="muon only: steps in which the momentum rises linearly from the smaller of 0.85 and "
        "optimizer.momentum to optimizer.momentum.",
    )
    nesterov: bool = Field(
        True,
        description="muon only: Nesterov momentum. Orthogonalise the mean of the gradient (weight 1 - momentum) and "
        "its running mean (weight momentum), instead of the running mean alone.",
    )
    ns_steps: int = Field(
        5, ge=1, le=20, description="muon only: number of Newton-Schulz iterations that orthogonalise an update."
    )
    ns_coefficients: Literal["quintic", "polar_express"] = Field(
        "quintic",
        description="muon only: polynomials of the iterations. quintic: Muon's own, which brings singular values to "
        "between 0.7 and 1.2. polar_express: a better polynomial for each iteration.",
    )
    update_scale: Literal["shape", "rms"] = Field(
        "shape",
        description="muon only: factor by which an orthogonalised update is multiplied. shape: "
        "sqrt(max(1, rows / columns)). rms: 0.2 sqrt(max(rows, columns)), so that AdamW's learning rate and weight "
        "decay fit.",
    )
    row_beta: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="muon only: NorMuon. Divide each row of an orthogonalised update by a running root mean square of "
        "this row over past steps. The value is the decay rate of the running mean per step; 0.95 is usual. Its state "
        "takes 4 bytes per parameter. Default: off.",
    )
    split_fused: bool = Field(
        True,
        description="muon only: orthogonalise the projections to queries, keys and values, and SwiGLU's gate and up, "
        "as separate matrices, although each is stored as one.",
    )

    @model_validator(mode="after")
    def _some_peak(self) -> OptimizerSection:
        """Raise ValueError if lr is 0 but a parameter group has its own peak learning rate.

        In each step, every peak rate is multiplied by the schedule's rate divided by lr.
        """
        if self.lr == 0 and (self.embedding_lr or self.head_lr or self.scalar_lr or self.muon_lr):
            raise ValueError(
                "train.optimizer.lr = 0 sets every learning rate to 0, also embedding_lr, head_lr, scalar_lr and "
                "muon_lr. Raise lr, or remove these keys"
            )
        return self


class ScheduleSection(Section):
    """The learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Shape of the learning rate after warm-up. wsd (warm-up, stable, decay): constant, then a "
        "decay at the end.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from near 0 to the peak.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay. Unused by constant.")
    decay_steps: int | None = Field(
        None, ge=1, description="wsd only: steps of the final decay. Default: a fifth of the run."
    )
    decay: Literal["linear", "sqrt"] = Field(
        "linear",
        description="wsd only: shape of the final decay, of which p is the elapsed fraction. linear: 1 - p. sqrt: "
        "1 - sqrt(p), which falls fast at first.",
    )


class BatchStageSection(Section):
    """A stage at the beginning of the run, with smaller batches than the stage after it."""

    until_tokens: float = Field(
        gt=0,
        lt=2**63,
        description="Tokens, counted from the start of the run, at which the stage ends. Its last step is the one that "
        "reaches them.",
    )
    global_batch_tokens: int = Field(
        ge=1, lt=2**40, description="Tokens per optimizer step in this stage; a multiple of data.seq_len."
    )


class TrainSection(Section):
    """Length, batch size, precision and optimizer."""

    seed: int = Field(
        1337, ge=0, lt=2**63, description="Seed of the initial weights, of the order of the data and of dropout."
    )
    steps: int | None = Field(
        None, ge=1, description="Optimizer steps of the complete run. Give either this or train.tokens."
    )
    tokens: float | None = Field(
        None,
        gt=0,
        lt=2**63,
        description="Tokens of the complete run, rounded up to full steps. Give either this or train.steps.",
    )
    global_batch_tokens: int = Field(
        ge=1, lt=2**40, description="Tokens per optimizer step, over all ranks; a multiple of data.seq_len."
    )
    batch_warmup: list[BatchStageSection] = Field(
        [],
        description="Stages with smaller batches at the beginning of the run, in ascending order; after the last one, "
        "a step has global_batch_tokens. The samples and their order are the same as without stages. The learning rate "
        "depends on the number of steps done, not of tokens (docs/recipes.md).",
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Samples per forward pass of a rank. Gradients are accumulated until the global batch is complete. "
        "auto: the largest number that divides a rank's share and has at most 16,384 tokens, however much memory "
        "the device has; each stage of batch_warmup has its own. Changes speed and memory, not the loss.",
    )
    precision: Literal["fp32", "bf16", "fp16", "fp8", "auto"] = Field(
        "auto",
        description="Number format of forward and backward passes. auto: bf16 if the device supports it, otherwise "
        "fp16 on a GPU and fp32 on a CPU. fp8: bf16, but linear layers multiply 8-bit numbers during training "
        "(NVIDIA GPUs from compute capability 8.9 on; CPUs emulate it slowly).",
    )
    fp8_skip_blocks: int = Field(
        1,
        ge=0,
        description="With precision fp8: number of blocks at the start, and as many at the end, whose linear layers "
        "stay in bf16. The embedding and the head always do.",
    )
    deterministic: bool = Field(
        True,
        description="Make every step on GPUs reproducible bit for bit, so that a resumed run equals the uninterrupted "
        "one. Estimated cost: attention's backward pass takes 1.2 to 2 times as long, which is 1 to 4% of a step at "
        "1,024 tokens per sample and 5 to 10% at 4,096; NCCL's sums inside the NVSwitch (NVLS) are off. false: resumed "
        "runs are equal up to rounding only, and `packspeed prove` refuses the run. CPUs are always reproducible.",
    )
    optimizer: OptimizerSection = Field(OptimizerSection(), description="The optimizer and its settings.")
    schedule: ScheduleSection = Field(
        ScheduleSection(), description="Learning-rate schedule: warm-up, shape of the decay, and final value."
    )
    grad_clip: float = Field(
        1.0,
        ge=0,
        description="Scale the gradient down if its global norm is larger than this; 0 = off.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        """Raise ValueError unless exactly one of steps and tokens is given."""
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of train.steps and train.tokens")
        return self

    @model_validator(mode="after")
    def _growing_batches(self) -> TrainSection:
        """Raise ValueError if a stage of batch_warmup has no step, or if batches become smaller after a stage."""
        try:
            _ = self.batches
        except ValueError as error:
            raise ValueError(
                f"train.batch_warmup, in tokens: {error}. Batches must not shrink, and each stage needs a step. "
                "Correct global_batch_tokens or until_tokens of one of these two stages (after batch_warmup, the "
                f"last stage has train.global_batch_tokens = {self.global_batch_tokens:,})"
            ) from None
        return self

    @property
    def batches(self) -> BatchSizes:
        """Batch sizes of the run in tokens: one per stage of batch_warmup, then global_batch_tokens."""
        warmup = [(stage.until_tokens, stage.global_batch_tokens) for stage in self.batch_warmup]
        return BatchSizes.staged(warmup, self.global_batch_tokens)

    def key_of_batch(self, tokens: int) -> str:
        """Return the key of the run file, as a text for messages, that sets a batch of this many tokens."""
        full = tokens == self.global_batch_tokens
        return "train.global_batch_tokens" if full else "train.batch_warmup: global_batch_tokens"

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the complete run, computed from train.tokens if that is given."""
        return self.steps if self.steps is not None else self.batches.count(self.tokens or 0)

    @property
    def total_tokens(self) -> int:
        """Tokens of all steps of the complete run together: train.tokens, rounded up to full steps."""
        return self.batches.start(self.total_steps)


class EvalSection(Section):
    """Validation during training. Every evaluation uses the same windows of the validation split."""

    every_steps: int = Field(
        1000, ge=0, description="Steps between evaluations; 0 = never. The last step is also followed by one."
    )
    windows: int = Field(200, ge=1, description="Number of windows of data.seq_len tokens per evaluation.")


class CheckpointSection(Section):
    """When checkpoints are saved and which are kept."""

    every_steps: int = Field(
        1000, ge=0, description="Steps between checkpoints; 0 = only at the end and when a signal stops the run."
    )
    keep: int = Field(3, ge=1, description="Keep the newest N checkpoints.")
    keep_best: int = Field(
        1,
        ge=0,
        description="Also keep the N checkpoints with the lowest validation loss, among those saved at a step with an "
        "evaluation.",
    )
    keep_every_steps: int = Field(0, ge=0, description="Also keep every checkpoint at a multiple of N steps; 0 = off.")
    async_write: bool = Field(
        False,
        description="Write checkpoints in the background while training continues. Needs host memory for one copy of "
        "the state.",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds to wait at a save until all ranks have arrived. After that the run fails and names the "
        "missing ranks.",
    )
    mirror: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9+.-]*://[^/].*|^(file|local|memory):///.*",
        description="URL of a folder to which checkpoints are copied in the background: s3://, gs://, file:// or "
        "another that fsspec opens. The copies are in <mirror>/<name>, as many as checkpoint.keep says. When the "
        "run starts, it fetches the newest copy if the run folder has no newer checkpoint.",
    )


class AnomalySection(Section):
    """What to do about a bad loss or gradient norm. The check precedes the optimizer's update of the weights."""

    nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="What to do if the loss or the gradient norm is NaN or infinite: stop the run, skip the step, or "
        "rewind to the newest checkpoint that was saved on schedule and continue after the bad batch.",
    )
    spike: Literal["off", "stop", "skip", "rewind"] = Field(
        "off",
        description="What to do if the loss or the gradient norm is a spike (see anomalies.zscore): off ignores it, "
        "the other values act as for anomalies.nonfinite.",
    )
    zscore: float = Field(
        10.0,
        gt=0,
        description="A value is a spike if it is this many robust standard deviations (1.4826 times the median "
        "absolute deviation) above the median of past steps.",
    )
    window: int = Field(
        128,
        ge=8,
        description="Number of past steps, without bad ones, from which the median and the deviation are computed.",
    )
    limit: int = Field(
        5,
        ge=1,
        description="Largest number of bad steps in a row, and of rewinds to the same checkpoint. One more stops the "
        "run.",
    )


class MonitorSection(Section):
    """What is logged during the run."""

    log_every_steps: int = Field(
        10,
        ge=1,
        description="Steps between lines on the console and points in TensorBoard. metrics.jsonl has a line for every "
        "step.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events to <run folder>/tensorboard.")
    histograms_every_steps: int = Field(
        0,
        ge=0,
        description="Steps between TensorBoard histograms of the norms of gradients and weights, per layer; 0 = never.",
    )
    sample_prompts: list[str] = Field(
        [],
        description="Prompts that the model continues at each evaluation. The texts are written to samples.jsonl and "
        "TensorBoard.",
    )
    sample_tokens: int = Field(64, ge=1, description="Tokens generated for each prompt.")


class ParallelSection(Section):
    """How many ranks share a sample (a row), the weights or the experts. Changes only speed, memory and rounding."""

    sequence: int = Field(
        1,
        ge=1,
        description="Ranks that share the tokens of each row (Ulysses sequence parallelism). Activations shrink by "
        "this factor. It must divide the number of ranks and model.n_head.",
    )
    tensor: int = Field(
        1,
        ge=1,
        description="Ranks that share the weights and heads of each layer, and the rows of the vocabulary (tensor "
        "parallelism). Weights, optimizer states and logits shrink by this factor. It must be a power of 2 and divide "
        "the number of ranks, model.n_head, model.n_kv_head and the MLP's hidden channels.",
    )
    expert: int = Field(
        1,
        ge=1,
        description="Ranks that share the experts of each layer, at ZeRO 0 to 2. It must divide the number of ranks "
        "and model.n_expert.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_pipeline(cls, data: object) -> object:
        """Raise ValueError if the section asks for pipeline parallelism. The message says what to use instead."""
        if isinstance(data, dict) and "pipeline" in data:
            raise ValueError(f"pipeline: {NO_PIPELINE}")
        return data

    @property
    def per_row(self) -> int:
        """Number of ranks that work on the same rows of the batch."""
        return self.sequence * self.tensor

    @property
    def fewest_ranks(self) -> int:
        """Smallest number of ranks with these sizes: tensor * lcm(sequence, expert)."""
        return self.tensor * math.lcm(self.sequence, self.expert)


class RunFile(Section):
    """A complete run file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run; its folder is <runs_dir>/<name>."
    )
    runs_dir: str = Field("runs", description="Folder that holds the run folders.")
    # create_model builds ModelSection from GPTConfig, so that each field of the model is defined once.
    model: ModelSection = Field(description="Shape of the model.")  # type: ignore[valid-type]
    data: DataSection = Field(description="The dataset and how it is cut into samples.")
    train: TrainSection = Field(description="Length, batch, precision and optimizer.")
    eval: EvalSection = Field(EvalSection(), description="Validation during training.")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="When to save and what to keep.")
    anomalies: AnomalySection = Field(AnomalySection(), description="What to do about NaN and loss spikes.")
    monitor: MonitorSection = Field(MonitorSection(), description="What to log.")
    parallel: ParallelSection = Field(ParallelSection(), description="How ranks share samples, weights and experts.")
    deepspeed: str = Field(
        "zero1", description="A name in ds_configs/, or a path to a DeepSpeed JSON (any value with a slash)."
    )

    @field_validator("name")
    @classmethod
    def _no_dots_only(cls, value: str) -> str:
        if value.startswith("."):
            raise ValueError("a run's name must not start with a dot")
        return value

    @model_validator(mode="after")
    def _full_samples(self) -> RunFile:
        """Raise ValueError if a batch size is no multiple of data.seq_len, or if the warm-up takes all steps."""
        seq_len = self.data.seq_len
        for tokens in self.train.batches.sizes:
            if tokens % seq_len:
                low = max(seq_len, tokens // seq_len * seq_len)
                raise ValueError(
                    f"{self.train.key_of_batch(tokens)} = {tokens} is not a multiple of data.seq_len = {seq_len}; "
                    f"the nearest that are: {low} and {tokens // seq_len * seq_len + seq_len}"
                )
        if self.train.schedule.warmup_steps >= self.train.total_steps:
            raise ValueError(
                f"train.schedule.warmup_steps = {self.train.schedule.warmup_steps} leaves no step of the "
                f"run's {self.train.total_steps} for training at the full learning rate; lower it"
            )
        return self

    @property
    def global_batch(self) -> int:
        """Number of samples (windows of data.seq_len tokens) per optimizer step, over all ranks. With
        train.batch_warmup, that of the steps after the last stage.
        """
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def batches(self) -> BatchSizes:
        """Batch sizes of the run in samples: one per stage of train.batch_warmup, then global_batch."""
        return self.train.batches.divided(self.data.seq_len)

    @property
    def folder(self) -> Path:
        """Path of the run folder: <runs_dir>/<name>."""
        return Path(self.runs_dir) / self.name

    @property
    def mirror(self) -> str | None:
        """URL of the folder with the copies of the run's checkpoints, <checkpoint.mirror>/<name>; None if there is
        none.
        """
        return f"{self.checkpoint.mirror.rstrip('/')}/{self.name}" if self.checkpoint.mirror else None

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """Return the configuration of the model.

        Keys of the run file override those of the preset. `vocab_size` is the vocabulary size of the dataset; the model
        has the same unless the run file gives another. Raises ConfigError if keys are missing or contradict each other.
        """
        given = {k: v for k, v in self.model.model_dump().items() if v is not None}  # type: ignore[attr-defined]
        name = given.pop("preset", None)
        if name is not None and name not in PRESETS:
            raise ConfigError(
                f"model.preset: unknown preset {name!r}{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}."
            )
        fields: JsonObject = {**(PRESETS[name] if name else {}), **given}
        if "vocab_size" not in given:
            fields["vocab_size"] = vocab_size
        fields.setdefault("max_seq_len", self.data.seq_len)
        if fields["vocab_size"] < vocab_size:
            raise ConfigError(
                f"model.vocab_size = {fields['vocab_size']} is smaller than the dataset's vocabulary of {vocab_size} "
                "tokens. Remove the key."
            )
        if fields["max_seq_len"] < self.data.seq_len:
            raise ConfigError(
                f"data.seq_len = {self.data.seq_len} is longer than the model's max_seq_len = {fields['max_seq_len']}; "
                "lower data.seq_len or raise model.max_seq_len."
            )
        missing = [
            f.name for f in dataclasses.fields(GPTConfig) if f.default is dataclasses.MISSING and f.name not in fields
        ]
        if missing:
            raise ConfigError(
                f"model: missing keys: {', '.join(missing)}. Give them, or a preset ({', '.join(PRESETS)})."
            )
        try:
            config = GPTConfig(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from None
        if config.mup is not None and self.train.optimizer.name == "muon":
            raise ConfigError(
                "model.mup with train.optimizer.name: muon: muP's rules are for AdamW, and Muon's update_scale: "
                "shape fits every width already. Remove one of the two."
            )
        if config.extra_heads >= self.data.seq_len:
            raise ConfigError(
                f"model.mtp.depth = {config.extra_heads}: in a sample of data.seq_len = {self.data.seq_len} tokens, "
                f"the last head has no target. Give at most {self.data.seq_len - 1}."
            )
        if self.train.precision == "fp8" and (
            obstacle := fp8_obstacle(config, self.data.seq_len, self.train.fp8_skip_blocks)
        ):
            raise ConfigError(f"train.precision: fp8: {obstacle}")
        return config
