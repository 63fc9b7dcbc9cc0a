"""The run file: the pydantic classes that define every key of the YAML that describes a run.

    run = load_run_file("launch/configs/quickstart.yaml", ["train.optimizer.lr=3e-4"])      # loading.py -> RunFile

The run file holds everything that can change the loss. How memory and network are used is in the DeepSpeed JSON
(deepspeed_json.py). Every key has a description here; `packspeed schema --markdown` prints them as docs/run_file.md.
Precedence: defaults < YAML < `--set key.path=value`. Objects are frozen. Loading takes 0.1 s and imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.json_types import JsonObject
from packspeed.model.config import PRESETS, GPTConfig


class Section(BaseModel):
    """Base of all blocks of the run file: frozen; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# One description per field of GPTConfig, which is plain Python and has no place for them. A test compares the names.
MODEL_KEYS = {
    "n_layer": "Number of transformer blocks.",
    "n_head": "Number of attention (query) heads.",
    "d_model": "Width of the residual stream, in channels.",
    "vocab_size": "Tokens in the vocabulary. Default: the dataset's tokenizer. The weights are padded to a multiple of "
    "128 rows; the padding never changes the loss.",
    "max_seq_len": "Longest sequence in tokens: rows of the learned position table, and the window of generation. "
    "Default: data.seq_len.",
    "n_kv_head": "Number of key-value heads; fewer than n_head is grouped-query attention. Default: n_head.",
    "head_dim": "Channels per attention head. Default: d_model / n_head.",
    "d_ff": "Hidden channels of the MLP. Default: 4 d_model; for swiglu 8/3 d_model, rounded up to a multiple of 256.",
    "norm": "Normalisation before attention, before the MLP and before the head.",
    "norm_eps": "Number added to the variance in every norm, against division by zero.",
    "position": "Position encoding: a learned table, or rotary embeddings (RoPE) of queries and keys.",
    "rope_theta": "Base of the wavelengths of RoPE. Unused with learned positions.",
    "mlp": "Activation of the MLP. gelu_tanh is GPT-2's approximation of gelu; swiglu has a third weight matrix.",
    "bias": "Biases: true in all linear layers and in LayerNorm, false nowhere, qkv in the layers of queries, keys and "
    "values only (Qwen2), attention in these and in attention's output layer.",
    "qk_norm": "Apply RMSNorm to the query and the key of each head.",
    "tie_embeddings": "Use the token embedding as the weight of the output head.",
    "dropout": "Dropout probability after the embedding and on both residual branches, in training only. The masks "
    "depend on the seed, the step and the sample, so that a resumed run repeats them.",
    "z_loss": "Weight of log(sum exp logits)^2 in the training loss of each token; PaLM used 1e-4.",
    "activation_checkpointing": "Recompute activations in the backward pass to save memory: none, full (every block), "
    "or n (every n-th block). Full costs about a third more compute.",
    "kernels": "Implementation of attention, norms and loss. auto: Triton on GPUs and C++ on CPUs if they build, else "
    "PyTorch. All agree to 1e-5.",
}


def _model_section() -> type[Section]:
    """The block `model:`: a preset, any fields of GPTConfig, or both (a field overrides the preset)."""
    hints = typing.get_type_hints(GPTConfig)
    fields: JsonObject = {
        f.name: (Union[hints[f.name], None], Field(None, description=MODEL_KEYS[f.name]))  # noqa: UP007
        for f in dataclasses.fields(GPTConfig)
    }
    preset = Annotated[str | None, Field(description=f"A published shape: {', '.join(PRESETS)}.")]
    section = create_model("ModelSection", __base__=Section, preset=(preset, None), **fields)
    section.__doc__ = "The shape of the model: a preset, any of the other keys, or both (a key overrides the preset)."
    return section


ModelSection = _model_section()


class SourceSection(Section):
    """One dataset of a mixture."""

    path: str = Field(description="Folder or URL of a prepared dataset.")
    weight: float = Field(1.0, ge=0, description="Share of the samples, relative to the weights of the other sources.")


class StageSection(Section):
    """New weights of the sources from some point of the run on."""

    from_tokens: float = Field(
        gt=0, description="Tokens of the run after which the stage starts, rounded up to a multiple of 4,096 samples."
    )
    weights: list[float] = Field(description="One weight for each source, in the order of data.sources.")


class DataSection(Section):
    """Which tokens are read, and how they are cut into samples."""

    path: str | None = Field(None, description="Folder or URL of a dataset written by packspeed prepare.")
    sources: list[SourceSection] | None = Field(
        None, min_length=1, description="Instead of data.path: a weighted mixture of datasets."
    )
    stages: list[StageSection] = Field([], description="Later weights of the sources, in ascending order of tokens.")
    seq_len: int = Field(
        ge=1, description="Tokens per sample. A sample reads seq_len + 1 tokens: inputs and shifted targets."
    )
    shuffle: Literal["blocks", "full"] = Field(
        "blocks",
        description="Order of the samples in an epoch. full: a random permutation of all of them. blocks: random "
        "blocks of neighbouring samples, shuffled inside, which reads the disk almost sequentially.",
    )
    packing: Literal["stream", "best_fit", "bos_aligned"] = Field(
        "stream",
        description="How documents fill samples. stream: cut the stream of all tokens into windows. best_fit: pack "
        "complete documents into rows, with a little padding. bos_aligned: only "
        "beginnings of documents; what does not fit a row is discarded.",
    )
    document_mask: bool = Field(
        False,
        description="Limit attention to the document of each token. best_fit and bos_aligned always do.",
    )
    cache_dir: str = Field("~/.cache/packspeed", description="Folder that caches shards read from URLs.")
    cache_gb: float = Field(100.0, gt=0, description="Largest size of the cache, in GB (1e9 bytes).")

    @model_validator(mode="after")
    def _one_place(self) -> DataSection:
        if (self.path is None) == (self.sources is None):
            raise ValueError("give exactly one of data.path and data.sources")
        if any(len(stage.weights) != len(self.sources or []) for stage in self.stages):
            raise ValueError(f"a stage of data.stages needs one weight for each of {len(self.sources or [])} sources")
        return self


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
        0.1, ge=0, description="Decoupled weight decay of matrices, per step and relative to the learning rate."
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Momentum of Muon. Unused by adamw and lion.")
    muon_lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the matrices that Muon updates. Default: optimizer.lr."
    )


class ScheduleSection(Section):
    """The learning rate as a function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Shape after warm-up. wsd (warm-up, stable, decay): constant, then a linear decay at the end.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up from near 0 to the peak.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay. Unused by constant.")
    decay_steps: int | None = Field(
        None, ge=1, description="wsd only: steps of the final decay. Default: a fifth of the run."
    )


class TrainSection(Section):
    """Length, batch size, precision and optimizer."""

    seed: int = Field(
        1337, ge=0, lt=2**63, description="Seed of the initial weights, of the order of the data and of dropout."
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps of the complete run. Or give train.tokens.")
    tokens: float | None = Field(
        None,
        gt=0,
        lt=2**63,
        description="Tokens of the complete run, rounded up to full steps. Instead of train.steps.",
    )
    global_batch_tokens: int = Field(
        ge=1, lt=2**40, description="Tokens per optimizer step, over all ranks; a multiple of data.seq_len."
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Samples per forward pass of a rank; gradients are accumulated up to the global batch. auto: the "
        "largest that divides the batch and has at most 16,384 tokens. Changes speed and memory, not the loss.",
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "auto", description="Arithmetic of forward and backward. auto: bf16 if the device has it, else fp32."
    )
    optimizer: OptimizerSection = Field(OptimizerSection(), description="The optimizer and its settings.")
    schedule: ScheduleSection = Field(ScheduleSection(), description="The learning rate over the run.")
    grad_clip: float = Field(
        1.0,
        ge=0,
        description="Scale the gradient down if its global norm is larger than this; 0 = off. Write 0 with "
        "muon, whose update DeepSpeed would cut.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of train.steps and train.tokens")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the complete run."""
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / self.global_batch_tokens)


class EvalSection(Section):
    """Validation on a fixed set of windows, the same at every evaluation."""

    every_steps: int = Field(1000, ge=0, description="Steps between evaluations; 0 = never. The last step evaluates.")
    windows: int = Field(200, ge=1, description="Validation windows of data.seq_len tokens per evaluation.")


class CheckpointSection(Section):
    """When checkpoints are saved and which are kept."""

    every_steps: int = Field(
        1000, ge=0, description="Steps between checkpoints; 0 = only at the end and when a signal stops the run."
    )
    keep: int = Field(3, ge=1, description="Keep the newest N checkpoints.")
    keep_best: int = Field(
        1,
        ge=0,
        description="Also keep the N checkpoints with the lowest validation loss, among those saved at an evaluation.",
    )
    keep_every_steps: int = Field(0, ge=0, description="Also keep every checkpoint at a multiple of N steps; 0 = off.")
    async_write: bool = Field(
        False,
        description="Copy the state to host memory and write it in the background while training continues. Needs "
        "host memory for one copy.",
    )
    timeout_s: float = Field(
        1800.0, gt=0, description="Seconds to wait for all ranks at a save before the run fails and names the missing."
    )


class AnomalySection(Section):
    """What happens if the loss or the gradient of a step is bad, before the optimizer applies it."""

    nonfinite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="If the loss or the gradient norm is NaN or infinite: stop the run, skip the step, or rewind to "
        "the newest scheduled checkpoint and continue after the bad batch.",
    )
    spike: Literal["off", "stop", "skip", "rewind"] = Field(
        "off", description="If the loss or the gradient norm is a spike (anomalies.zscore): nothing, or as nonfinite."
    )
    zscore: float = Field(
        10.0, gt=0, description="A value is a spike if it is this many robust standard deviations above the median."
    )
    window: int = Field(128, ge=8, description="Number of accepted steps that give the median and the deviation.")
    limit: int = Field(
        5,
        ge=1,
        description="Vetoed steps in a row, or rewinds to one checkpoint, that are allowed; the next stops the run.",
    )


class MonitorSection(Section):
    """What is logged during the run."""

    log_every_steps: int = Field(
        10, ge=1, description="Steps between lines on the console and in TensorBoard; metrics.jsonl has every step."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events to <run folder>/tensorboard.")
    histograms_every_steps: int = Field(
        0, ge=0, description="Steps between norms of gradients and weights per layer, in TensorBoard; 0 = never."
    )
    sample_prompts: list[str] = Field(
        [], description="Prompts to continue at each evaluation, for samples.jsonl and TensorBoard."
    )
    sample_tokens: int = Field(64, ge=1, description="Tokens generated for each prompt.")


class RunFile(Section):
    """A complete run file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run; its folder is <runs_dir>/<name>."
    )
    runs_dir: str = Field("runs", description="Folder that holds the run folders.")
    # create_model builds ModelSection from GPTConfig, so that each field of the model is defined once.
    model: ModelSection = Field(description="Shape of the model: a preset, fields, or both.")  # type: ignore[valid-type]
    data: DataSection = Field(description="The dataset and how it is cut into samples.")
    train: TrainSection = Field(description="Length, batch, precision and optimizer.")
    eval: EvalSection = Field(EvalSection(), description="Validation during training.")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="When to save and what to keep.")
    anomalies: AnomalySection = Field(AnomalySection(), description="What to do about NaN and loss spikes.")
    monitor: MonitorSection = Field(MonitorSection(), description="What to log.")
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
        tokens, seq_len = self.train.global_batch_tokens, self.data.seq_len
        if tokens % seq_len:
            low = max(seq_len, tokens // seq_len * seq_len)
            raise ValueError(
                f"train.global_batch_tokens = {tokens} is not a multiple of data.seq_len = {seq_len}; "
                f"the nearest that are: {low} and {tokens // seq_len * seq_len + seq_len}"
            )
        if self.train.schedule.warmup_steps >= self.train.total_steps:
            raise ValueError(
                f"train.schedule.warmup_steps = {self.train.schedule.warmup_steps} leaves no step of the "
                f"run's {self.train.total_steps} for training at the full learning rate"
            )
        return self

    @property
    def global_batch(self) -> int:
        """Samples (windows of data.seq_len tokens) of one optimizer step over all ranks."""
        return self.train.global_batch_tokens // self.data.seq_len

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.runs_dir) / self.name

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The configuration of the model. A key that the run file omits comes from the preset, else from the dataset.

        `vocab_size` is the dataset's. Raises ConfigError if the values contradict each other.
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
                f"model.vocab_size = {fields['vocab_size']} is smaller than the dataset's {vocab_size}; leave it out."
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
            raise ConfigError(f"model: {', '.join(missing)} missing; give them, or a preset ({', '.join(PRESETS)}).")
        try:
            return GPTConfig(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model: {error}") from None
