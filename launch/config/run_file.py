"""The run file: YAML that says everything that can change the loss.

    load_run_file("launch/configs/quickstart.yaml", ["train.optimizer.lr=3e-4"])  ->  RunFile (frozen)

Precedence: defaults < YAML < `--set key.path=value`. An unknown key, a wrong type or a value out of range is
refused with file, line, dotted path and the nearest valid key (difflib). The DeepSpeed JSON is ds_config.py's.
Cost: 0.1 s; imports neither torch nor deepspeed.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.model.config import PRESETS, GPTConfig


class Section(BaseModel):
    """What every block of the run file has in common: frozen, and no unknown key gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _model_section() -> type[Section]:
    """`model:` takes a preset, any field of GPTConfig, or both (the fields override the preset)."""
    hints = typing.get_type_hints(GPTConfig)
    fields: dict[str, Any] = {f.name: (Union[hints[f.name], None], None) for f in dataclasses.fields(GPTConfig)}  # noqa: UP007
    preset = Annotated[str | None, Field(description="one of: " + ", ".join(PRESETS))]
    return create_model("ModelSection", __base__=Section, preset=(preset, None), **fields)


ModelSection = _model_section()


class SourceSection(Section):
    """One dataset of a mixture."""

    path: str = Field(description="folder or URL of a prepared dataset")
    weight: float = Field(1.0, ge=0, description="share of the samples, relative to the other sources")


class StageSection(Section):
    """Other weights from a token of the run on."""

    from_tokens: float = Field(gt=0, description="tokens of the run before it; rounded up to 4,096 samples")
    weights: list[float] = Field(description="one for each source")


class DataSection(Section):
    """Which tokens are read, and how they are cut into samples."""

    path: str | None = Field(None, description="folder or URL of a prepared dataset (packspeed prepare)")
    sources: list[SourceSection] | None = Field(None, min_length=1, description="instead of path: a mixture")
    stages: list[StageSection] = Field([], description="later weights of the sources")
    seq_len: int = Field(ge=1, description="tokens per sample; windows of seq_len + 1 tokens are read")
    shuffle: Literal["blocks", "full"] = "blocks"
    packing: Literal["stream", "best_fit", "bos_aligned"] = "stream"
    document_mask: bool = Field(False, description="attention stays inside documents; packed rows always have it")
    cache_dir: str = Field("~/.cache/packspeed", description="where shards behind URLs are kept")
    cache_gb: float = Field(100.0, gt=0, description="most that is kept there, in 1e9 bytes")

    @model_validator(mode="after")
    def _one_place(self) -> DataSection:
        if (self.path is None) == (self.sources is None):
            raise ValueError("give exactly one of data.path and data.sources")
        if any(len(stage.weights) != len(self.sources or []) for stage in self.stages):
            raise ValueError(f"a stage of data.stages needs one weight for each of {len(self.sources or [])} sources")
        return self


class OptimizerSection(Section):
    """AdamW, Lion, or Muon for the hidden matrices with AdamW for the rest; decay on matrices only."""

    name: Literal["adamw", "muon", "lion"] = "adamw"
    lr: float = Field(6e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    muon_lr: float | None = Field(None, gt=0, description="Muon's learning rate; the schedule scales both alike")


class ScheduleSection(Section):
    """The learning rate as a pure function of the step."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)
    decay_steps: int | None = Field(
        None, ge=1, description="wsd: length of the final decay; default a fifth of the run"
    )


class TrainSection(Section):
    """How long, how large a batch, in which precision, with which optimizer."""

    seed: int = Field(1337, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1)
    tokens: float | None = Field(None, gt=0, description="instead of steps: rounded up to whole steps")
    global_batch_tokens: int = Field(ge=1, description="tokens of one optimizer step over all ranks")
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    grad_clip: float = Field(1.0, ge=0, description="0 turns clipping off")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of train.steps and train.tokens")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / self.global_batch_tokens)


class EvalSection(Section):
    """Validation on a fixed set of windows, the same at every evaluation."""

    every_steps: int = Field(1000, ge=0, description="0: never")
    windows: int = Field(200, ge=1)


class CheckpointSection(Section):
    """When to save and what to keep."""

    every_steps: int = Field(1000, ge=0, description="0: only at the end or when stopped")
    keep: int = Field(3, ge=1, description="the newest n stay")
    keep_best: int = Field(1, ge=0, description="the n of lowest validation loss stay, of those evaluated when saved")
    keep_every_steps: int = Field(0, ge=0, description="checkpoints at multiples of it stay for ever; 0: none")
    async_write: bool = Field(False, description="copy to host memory, write while training; needs memory for a copy")
    timeout_s: float = Field(1800.0, gt=0, description="a rank that comes later than this to a save ends the run")


class AnomalySection(Section):
    """What to do when a step's numbers are wrong, before the optimizer takes it."""

    nonfinite: Literal["stop", "skip", "rewind"] = Field("stop", description="loss or gradient is NaN or infinite")
    spike: Literal["off", "stop", "skip", "rewind"] = Field("off", description="loss or gradient norm out of line")
    zscore: float = Field(10.0, gt=0, description="a spike is that many robust standard deviations above the median")
    window: int = Field(128, ge=8, description="accepted steps that a step is compared with")
    limit: int = Field(5, ge=1, description="this many anomalies in a row are dealt with, then the run stops")


class MonitorSection(Section):
    """What is written while the run goes on."""

    log_every_steps: int = Field(10, ge=1, description="console and TensorBoard; metrics.jsonl has every step")
    tensorboard: bool = True
    histograms_every_steps: int = Field(0, ge=0, description="norms of gradients and weights per layer; 0: never")
    sample_prompts: list[str] = Field([], description="continued at each evaluation: samples.jsonl, TensorBoard's text")
    sample_tokens: int = Field(64, ge=1, description="tokens of each of these texts")


class RunFile(Section):
    """A whole run file. `name` gives the run folder <runs_dir>/<name>."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    model: ModelSection  # type: ignore[valid-type]  # made by create_model from GPTConfig, so that fields live once
    data: DataSection
    train: TrainSection
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    anomalies: AnomalySection = AnomalySection()
    monitor: MonitorSection = MonitorSection()
    deepspeed: str = Field("zero1", description="a name in ds_configs/, or a path (anything with a slash)")

    @field_validator("name")
    @classmethod
    def _no_dots_only(cls, value: str) -> str:
        if value.startswith("."):
            raise ValueError("a run's name must not start with a dot")
        return value

    @model_validator(mode="after")
    def _whole_samples(self) -> RunFile:
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
                f"{self.train.total_steps} of the run for training at the full learning rate"
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
        """Build the model's configuration; what the run file leaves out comes from the preset, then the dataset.

        Raises ConfigError where the pieces do not fit each other.
        """
        given = {k: v for k, v in self.model.model_dump().items() if v is not None}  # type: ignore[attr-defined]
        name = given.pop("preset", None)
        if name is not None and name not in PRESETS:
            raise ConfigError(
                f"model.preset: {name!r} is no preset{nearest(name, PRESETS)} There are: {', '.join(PRESETS)}."
            )
        fields: dict[str, Any] = {**(PRESETS[name] if name else {}), **given}
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
                "lower the one or raise model.max_seq_len."
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
