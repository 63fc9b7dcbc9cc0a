"""The JSON formats of a run folder: every key with its unit and its meaning.

    metrics.jsonl     StepLine after every step, EvaluationLine after every evaluation
    goodput.jsonl     Life, one per start of rank 0's process
    samples.jsonl     SamplesLine, one per evaluation
    anomalies.jsonl   AnomalyLine, one per vetoed step: a step that was not applied, because its loss or gradient norm
                      was bad
    status.json       Status, one object
    settings.jsonl    SettingChange, one per setting that a resume has changed
    environment.json  Environment, one object: how, where and with which software the newest process started

Each annotation is (type, unit, meaning). docs/metrics.md has the same tables; tests/test_metrics_page.py checks that
both are equal. At run time the values are plain dicts.
"""

from __future__ import annotations

from typing import Annotated, TypedDict, final

CHECKPOINT_MANIFEST = "packspeed.json"  # the file in a checkpoint that is written last; checkpoint/manifest.py reads it
PLAN_FILE = "plan.json"  # a PlanResult


class _StepLine(TypedDict):
    step: Annotated[int, "steps", "completed optimizer steps, counted from 1"]
    tokens: Annotated[int, "tokens", "training tokens up to and including this step"]
    samples: Annotated[int, "samples", "samples read so far, including those of batches that a rewind dropped"]
    data_hash: Annotated[str, "8 hex digits", "hash of the global batch, equal for any number of ranks"]
    loss: Annotated[float | None, "nats per token", "mean over the global batch; null if it is not finite"]
    lr: Annotated[float, "", "learning rate of this step"]
    grad_norm: Annotated[float | None, "", "global L2 norm before clipping; null if it is not finite"]
    step_time_s: Annotated[float, "seconds", "wall time of the step, including the wait for its batch"]
    tokens_per_s: Annotated[float, "tokens/s", "tokens of a step divided by step_time_s, all ranks together"]
    mfu: Annotated[float | None, "share", "model FLOPs utilisation, 0 to 1; null if it is not finite"]
    data_wait_s: Annotated[float, "seconds", "part of step_time_s that waited for the batch"]
    memory_gib: Annotated[float, "GiB", "memory of rank 0: peak allocation on a GPU, current resident memory on a CPU"]


@final
class StepLine(_StepLine, total=False):
    """A line of metrics.jsonl for a training step. The keys below exist only if they apply."""

    batch_tokens: Annotated[int, "tokens", "train.batch_warmup only: tokens of this step"]
    skipped: Annotated[str, "", "why the optimizer did not apply this step"]
    # In the order of data.sources; older versions wrote an object with the sources' paths as keys.
    epochs: Annotated[list[float] | dict[str, float], "epochs", "mixtures only: passes over each source so far"]
    mtp_losses: Annotated[
        list[float | None],
        "nats per token",
        "model.mtp only: loss of each extra head, the mean over its targets; null if it is not finite",
    ]
    expert_load: Annotated[float, "", "experts only: largest load of an expert over its layer's mean, in any layer"]
    dead_experts: Annotated[
        int, "experts", "experts without a token of the global batch, padding included, in all layers"
    ]
    planned_step_time_s: Annotated[float, "seconds", "step time of the locked plan, in the first 20 steps of a process"]
    planned_memory_gib: Annotated[float, "GiB", "memory of the locked plan, to compare with memory_gib"]


@final
class PlanResult(TypedDict):
    """plan.json: the first steps of the newest process, compared with the locked plan."""

    steps: Annotated[int, "steps", "number of steps that were measured"]
    planned: Annotated[dict[str, float], "", "step_time_s and memory_gib of the plan"]
    measured: Annotated[dict[str, float], "", "the same, measured: median and largest after five steps"]
    error: Annotated[dict[str, float], "share", "measured / planned - 1"]
    bar: Annotated[dict[str, float], "share", "nine tenths of plans are within this error"]
    planned_step_s: Annotated[dict[str, float], "seconds", "planned step time by part"]
    measured_step_s: Annotated[dict[str, float], "seconds", "measured step time by kind of work, the mean"]
    planned_memory_gib: Annotated[dict[str, float], "GiB", "planned memory by kind"]
    measured_memory_gib: Annotated[dict[str, float], "GiB", "what a GPU's allocator reports by kind; empty on CPUs"]


@final
class EvaluationLine(TypedDict):
    """A line of metrics.jsonl for an evaluation. It follows the StepLine of the same step."""

    step: Annotated[int, "steps", "completed optimizer steps at the evaluation"]
    val_loss: Annotated[float | None, "nats per token", "mean over the validation windows; null if it is not finite"]
    val_tokens: Annotated[int, "tokens", "tokens that were evaluated"]
    eval_time_s: Annotated[float, "seconds", "wall time of the evaluation"]


MetricsLine = StepLine | EvaluationLine


class _Life(TypedDict):
    started_at: Annotated[float, "seconds since 1970", "start of the process"]
    pid: Annotated[int, "", "process id of rank 0"]
    host: Annotated[str, "", "host name of rank 0"]
    from_step: Annotated[int, "steps", "step of the checkpoint from which the process started"]
    step: Annotated[int, "steps", "last completed step"]
    ended: Annotated[str | None, "", "finished, stopped or failed; null while the process runs and after a crash"]
    seconds: Annotated[
        dict[str, float], "seconds", "time per bucket; they add up to the time from the start to the end"
    ]
    open_s: Annotated[float, "seconds", "compute and communication of the unfinished step, lost if the process dies"]


class Life(_Life, total=False):
    """A line of goodput.jsonl: one life of rank 0's process, from its start to its end.

    The process overwrites its line while it runs.
    """

    clock_step_s: Annotated[float, "seconds of the clock", "how far the host's clock was set ahead (+) or back (-)"]


class EndedLife(Life):
    """A line of goodput.jsonl as the reader returns it: a Life with the time of its end."""

    ended_at: Annotated[float, "seconds since 1970", "started_at plus all seconds and clock_step_s"]


class Sample(TypedDict):
    """A prompt of monitor.sample_prompts and its continuation."""

    prompt: Annotated[str, "", "the prompt"]
    text: Annotated[str, "", "the generated continuation"]


class SamplesLine(TypedDict):
    """A line of samples.jsonl: the texts that were generated at one evaluation."""

    step: Annotated[int, "steps", "completed optimizer steps"]
    samples: Annotated[list[Sample], "", "one object with prompt and text for each prompt"]


class _AnomalyLine(TypedDict):
    step: Annotated[int, "steps", "the step that was vetoed"]
    reason: Annotated[str, "", "what was wrong: a value that is not finite, or a spike with its z-score"]
    policy: Annotated[str, "", "stop, skip or rewind, from the run file"]
    loss: Annotated[float | None, "nats per token", "loss of the vetoed step; null if it is not finite"]
    grad_norm: Annotated[float | None, "", "gradient norm of the vetoed step before clipping; null if it is not finite"]
    first_sample: Annotated[int, "samples", "index of the first sample of the batch, from 0"]
    samples: Annotated[int, "samples", "number of samples in the batch"]


class AnomalyLine(_AnomalyLine, total=False):
    """A line of anomalies.jsonl: a step that was vetoed, so that the optimizer did not apply it.

    `back_to` exists only after a rewind.
    """

    back_to: Annotated[int, "steps", "step of the checkpoint from which training continued"]


class SettingChange(TypedDict):
    """A line of settings.jsonl: a setting that was changed when the run resumed.

    Unlike checkpoints, the file is never deleted.
    """

    step: Annotated[int, "steps", "step of the checkpoint that was resumed; later steps use the new value"]
    key: Annotated[str, "", "key of the run file, such as train.optimizer.lr"]
    old: Annotated[object, "", "value before; null if the key was not set"]
    new: Annotated[object, "", "value since; null if the key is not set"]


class Status(TypedDict):
    """The content of status.json: the state of a run, and the process that has written it."""

    state: Annotated[str, "", "running, stopped, finished or failed"]
    pid: Annotated[int, "", "process id of rank 0"]
    host: Annotated[str, "", "host name of rank 0"]
    at: Annotated[float, "seconds since 1970", "when this file was written"]


class ComputeEnvironment(TypedDict):
    """Hardware and software that must stay the same if a resumed run is to equal an uninterrupted one bit for bit.

    A checkpoint's manifest has it under the key `environment`. The versions of DeepSpeed and torch must stay the same
    too; they are under the key `versions`.
    """

    devices: list[str]  # models of the GPUs, or of the CPUs, of all ranks; each once
    ranks: int
    ranks_per_host: list[int]  # in the order of the ranks
    threads: int | None  # per rank; None on GPUs, where no sum depends on them
    cuda: str | None  # the version that torch was built for, of CUDA or ROCm; None on CPUs, as for the next three
    cudnn: str | None
    nccl: str | None
    driver: str | None  # None also if the kernel does not show it


class Environment(TypedDict):
    """The content of environment.json: how the newest process of the run was started, and with which software."""

    command: Annotated[list[str], "", "command line of rank 0"]
    python: Annotated[str, "", "version of Python"]
    versions: Annotated[dict[str, str], "", "versions of the packages that can change a run's numbers"]
    git_commit: Annotated[str | None, "", "commit of the checkout, with -dirty if files were changed"]
    hosts: Annotated[list[str], "", "names of all hosts"]
    ranks: Annotated[int, "ranks", "number of processes"]
    device: Annotated[str, "", "type of the device: cpu, cuda"]
    cpus_per_host: Annotated[int | None, "", "cores of the host of rank 0"]
    started_at: Annotated[str, "", "local time of the start"]
