"""Lint rules for the run file: learning rate, data, model and batch, checkpoints and logging.

lint.py says what a rule is. The limits come from papers and issues.
"""

from __future__ import annotations

from collections.abc import Iterator

from packspeed.launch.explain.lint import Case, rule

# Keys of train.optimizer that Muon alone reads.
MUON_ONLY = (
    "momentum", "momentum_warmup_steps", "muon_lr", "nesterov", "ns_steps", "ns_coefficients", "update_scale",
    "split_fused", "row_beta",
)  # fmt: skip

SHORT_RUN = 100  # steps; a shorter run is a trial


# ---- learning rate ----
@rule("loss")
def minimum_above_peak(case: Case) -> Iterator[str]:
    """min_lr is larger than the peak learning rate, so the learning rate rises during the decay.

    Symptom: the learning rate grows until the end of the run.
    Fix: lower train.schedule.min_lr; a tenth of the peak is usual.
    """
    low, peak = case.run.train.schedule.min_lr, case.run.train.optimizer.lr
    if low > peak and case.run.train.schedule.name != "constant":
        yield (
            f"train.schedule.min_lr = {low:g} is above train.optimizer.lr = {peak:g}, so the learning rate rises "
            f"during "
            "the decay. Lower min_lr."
        )


@rule("loss", "DeepSpeed#7303")
def warmup_is_most_of_the_run(case: Case) -> Iterator[str]:
    """Warm-up takes more than a quarter of the run, so few steps train at the peak learning rate.

    Symptom: the loss is worse than that of a run with less warm-up.
    Fix: use 1% to 5% of the steps.
    """
    warmup, total = case.run.train.schedule.warmup_steps, case.run.train.total_steps
    if total > 1 and warmup > total / 4:
        yield (
            f"train.schedule.warmup_steps = {warmup} is {warmup / total:.0%} of the run's {total} steps. Lower it; 1% "
            f"to "
            "5% is usual."
        )


@rule("loss", "RAdam, arXiv:1908.03265; LOG.md, 2026-11-30")
def no_warmup(case: Case) -> Iterator[str]:
    """AdamW starts at the peak learning rate, while its estimates of the second moments rest on few gradients.

    Symptom: the loss rises again after some steps, and then runs in different layouts differ by more than rounding.
    Fix: set train.schedule.warmup_steps to 1% to 5% of the steps.
    """
    train = case.run.train
    if train.optimizer.name == "adamw" and train.schedule.warmup_steps == 0 and train.total_steps >= SHORT_RUN:
        yield (
            "train.schedule.warmup_steps = 0 starts AdamW at its peak learning rate. Warm up for 1% "
            f"to 5% of the run's {train.total_steps:,} steps."
        )


@rule("loss", "GPT-3, arXiv:2005.14165; DeepSeek-V3, arXiv:2412.19437")
def batch_warmup_is_most_of_the_run(case: Case) -> Iterator[str]:
    """The stages of train.batch_warmup take more than half of the run's tokens, so few steps have the full batch.

    Symptom: the run has more steps than expected, and the loss is noisy until its end.
    Fix: end the last stage earlier, or lower train.global_batch_tokens.
    """
    train = case.run.train
    warmup = train.batches.stages[-1].first_sample
    if warmup > train.total_tokens / 2:
        yield (
            f"train.batch_warmup takes {warmup:,} tokens, more than half of the run's {train.total_tokens:,}. Lower "
            "until_tokens of its stages."
        )


@rule("useless")
def schedule_settings_unused(case: Case) -> Iterator[str]:
    """A key of train.schedule or train.optimizer belongs to another schedule or optimizer than the chosen one.

    Symptom: the setting makes no difference.
    Fix: remove the key, or choose the schedule or optimizer that reads it.
    """
    schedule, optimizer = case.run.train.schedule, case.run.train.optimizer
    for key in ("decay_steps", "decay"):
        if f"train.schedule.{key}" in case.given and schedule.name != "wsd":
            yield f"train.schedule.{key} has an effect with wsd only, but the schedule is {schedule.name}. Remove it."
    if schedule.min_lr > 0 and schedule.name == "constant":
        yield "train.schedule.min_lr has no effect with the schedule constant. Remove it."
    for key in MUON_ONLY:
        if f"train.optimizer.{key}" in case.given and optimizer.name != "muon":
            yield f"train.optimizer.{key} has an effect with muon only, not with {optimizer.name}. Remove it."


@rule("loss")
def decay_longer_than_the_run(case: Case) -> Iterator[str]:
    """The decay of wsd takes all steps after warm-up, so there is no phase with a constant rate.

    Symptom: the learning rate falls as soon as warm-up ends.
    Fix: lower train.schedule.decay_steps; a fifth of the run is usual.
    """
    schedule, total = case.run.train.schedule, case.run.train.total_steps
    if schedule.name == "wsd" and (schedule.decay_steps or 0) > total - schedule.warmup_steps:
        yield (
            f"train.schedule.decay_steps = {schedule.decay_steps} is more than the steps after warm-up (the run has "
            f"{total} in all). Lower it."
        )


@rule("loss", "GPT-3, arXiv:2005.14165, table 2.1; Lion, arXiv:2302.06675")
def unusual_learning_rate(case: Case) -> Iterator[str]:
    """A setting of the optimizer is outside the range that published runs of this size use.

    Symptom: the loss diverges, or falls slowly.
    Fix: start from 6e-4 for AdamW at 125 M parameters; use a third to a tenth of that for Lion.
    """
    optimizer, n = case.run.train.optimizer, case.parameters or 0
    limit = 2e-3 if n > 50e6 else 2e-2
    if optimizer.name == "adamw" and optimizer.lr > limit:
        yield (
            f"train.optimizer.lr = {optimizer.lr:g} is high for AdamW with {n / 1e6:,.1f} M parameters. GPT-3 used "
            f"6e-4 "
            "for 125 M."
        )
    if optimizer.name == "lion" and optimizer.lr > 3e-4:
        yield (
            f"train.optimizer.lr = {optimizer.lr:g} is high for Lion. Its paper uses a third to a tenth of AdamW's "
            f"rate."
        )
    if any(not 0 <= beta < 1 for beta in optimizer.betas):
        yield f"train.optimizer.betas = {list(optimizer.betas)}: both must be at least 0 and less than 1."
    if optimizer.weight_decay > 1:
        yield f"train.optimizer.weight_decay = {optimizer.weight_decay:g} pulls the weights to zero. 0.1 is usual."


@rule("loss", "Muon, kellerjordan.github.io/posts/muon; Moonlight, arXiv:2502.16982")
def muon_rate_of_another_scale(case: Case) -> Iterator[str]:
    """The learning rate of Muon's matrices does not fit train.optimizer.update_scale.

    Symptom: with shape and a rate such as AdamW's, the matrices hardly learn. With rms and a rate such as 0.02, the
    loss diverges.
    Fix: with shape, set train.optimizer.muon_lr to 0.01 to 0.05; with rms, leave it out, or use AdamW's rate.
    """
    optimizer = case.run.train.optimizer
    rate, scale = optimizer.muon_lr or optimizer.lr, optimizer.update_scale
    if optimizer.name == "muon" and rate > 0 and (rate < 2e-3 if scale == "shape" else rate > 1e-2):
        usual = "0.01 to 0.05" if scale == "shape" else "that of AdamW"
        yield (
            f"train.optimizer.muon_lr = {rate:g} with update_scale: {scale} is unusual: {usual} is usual. Change it, "
            "or choose the other update_scale."
        )


@rule("loss")
def no_clipping(case: Case) -> Iterator[str]:
    """Without clipping, or with a very high limit, nothing limits the update by one bad batch.

    Symptom: a loss spike from which the run recovers slowly or never.
    Fix: set train.grad_clip: 1.0.
    """
    if case.run.train.grad_clip == 0 and case.run.train.optimizer.name != "muon":
        yield "train.grad_clip = 0: nothing limits the update by a bad batch. 1.0 is usual."
    elif case.run.train.grad_clip > 10:
        yield (
            f"train.grad_clip = {case.run.train.grad_clip:g} clips almost nothing, because gradient norms are usually "
            "near 1. 1.0 is usual."
        )


@rule("unsafe", "NVIDIA/Megatron-LM --deterministic-mode")
def not_deterministic(case: Case) -> Iterator[str]:
    """Without train.deterministic, GPUs may add the same numbers in a different order each time.

    Symptom: on GPUs a resumed run differs from the uninterrupted one by rounding, which grows with the steps.
    Fix: remove train.deterministic: false, unless you need the speed.
    """
    if not case.run.train.deterministic:
        yield (
            "train.deterministic = false: on GPUs no step can be repeated bit for bit, so a resumed run equals an "
            "uninterrupted one only up to rounding, and packspeed prove refuses the run. This saves an estimated 1 to "
            "4% of a step at 1,024 tokens per sample and 5 to 10% at 4,096 (packspeed bench measures it). On CPUs it "
            "changes nothing. Remove the key unless you need the speed."
        )


# ---- data, model and batch ----
@rule("loss", "Muennighoff et al., arXiv:2305.16264")
def too_many_epochs(case: Case) -> Iterator[str]:
    """Beyond four epochs, repeated tokens improve the model less and less.

    Symptom: the training loss falls while the validation loss rises.
    Fix: use more data, fewer steps or a smaller model.
    """
    if case.train_tokens:
        epochs = case.run.train.total_tokens / case.train_tokens
        if epochs > 4:
            yield (
                f"the run reads the {case.train_tokens:,} training tokens {epochs:.1f} times. Beyond 4 times, "
                "repeated tokens improve the model less and less. Use more data or fewer steps."
            )


@rule("useless")
def evaluation_beyond_the_data(case: Case) -> Iterator[str]:
    """eval.windows is more than the validation split has, or eval.every_steps is more than the steps of the run.

    Symptom: there are fewer windows or fewer evaluations than expected.
    Fix: lower eval.windows or eval.every_steps, or prepare the dataset again with a larger --val-fraction.
    """
    section, steps = case.run.eval, case.run.train.total_steps
    if case.val_tokens is not None and section.every_steps:
        available = max(0, (case.val_tokens - 1) // case.run.data.seq_len)
        if section.windows > available:
            yield (
                f"eval.windows = {section.windows}, but the validation split has only {available} windows of "
                f"{case.run.data.seq_len} tokens. Lower it, or prepare with a larger --val-fraction."
            )
    if section.every_steps > steps:
        yield (
            f"eval.every_steps = {section.every_steps} is more than the run's {steps} steps, so only the last step is "
            "followed by an evaluation. Lower it."
        )


@rule("slow", "nanoGPT, model.py: vocab_size 50304")
def uneven_widths(case: Case) -> Iterator[str]:
    """Tensor cores and fused attention are fast only if the head width is a multiple of 8 and d_model a multiple of 64.

    Symptom: MFU is low.
    Fix: choose a head width divisible by 8 and a d_model divisible by 64.
    """
    model = case.model
    if model is None or not case.on_gpu:
        return
    if model.head_width % 8:
        yield (
            f"attention heads have {model.head_width} channels, which is not a multiple of 8, so fused attention uses "
            "a slow kernel. Change n_head, d_model or head_dim."
        )
    if model.d_model % 64:
        yield (
            f"model.d_model = {model.d_model} is not a multiple of 64, so matrix products do not reach full speed. "
            "Change d_model."
        )


@rule("useless", "packspeed: positions beyond seq_len are never trained")
def untrained_positions(case: Case) -> Iterator[str]:
    """The learned position table is longer than any sample, so its last rows are never trained.

    Symptom: text generated beyond data.seq_len is noise.
    Fix: lower model.max_seq_len, raise data.seq_len, or use position: rope.
    """
    model, length = case.model, case.run.data.seq_len
    if model is not None and model.position == "learned" and model.max_seq_len > length:
        yield (
            f"model.max_seq_len = {model.max_seq_len}, but samples have {length} tokens, so positions from {length} on "
            "are never trained, and text generated there is noise. Lower max_seq_len, raise data.seq_len, or use "
            "position: rope."
        )


@rule("useless")
def longer_than_a_sample(case: Case) -> Iterator[str]:
    """model.sliding_window is not shorter than a sample, or model.mlp_chunk is not smaller than the micro batch of a
    rank.

    Symptom: the setting changes neither loss nor memory in training.
    Fix: lower model.sliding_window or model.mlp_chunk, or remove it.
    """
    model, length = case.model, case.run.data.seq_len
    if model is None:
        return
    if model.sliding_window is not None and model.sliding_window >= length:
        yield (
            f"model.sliding_window = {model.sliding_window} is not shorter than a sample of {length} tokens, so every "
            "token attends to all earlier ones. Lower it, or remove it."
        )
    tokens = case.micro_batch * length // case.run.parallel.sequence
    if model.mlp_chunk is not None and model.mlp_chunk >= tokens:
        yield (
            f"model.mlp_chunk = {model.mlp_chunk} is not smaller than the {tokens} tokens of a rank's forward pass, so "
            "nothing is divided. Lower it, or remove it."
        )


@rule("slow")
def small_micro_batches(case: Case) -> Iterator[str]:
    """Many small forward passes use the device less efficiently than a few large ones.

    Symptom: MFU is low, and memory is free.
    Fix: leave train.micro_batch at auto, or raise it.
    """
    tokens = case.micro_batch * case.run.data.seq_len
    if case.accumulation >= 16 and tokens < 4096 and case.run.train.micro_batch != "auto":
        yield (
            f"train.micro_batch = {case.micro_batch} needs {case.accumulation} passes of only {tokens} tokens per "
            "step, which is slow. Remove the key (auto), or raise it if memory allows."
        )


@rule("loss")
def dropout_in_one_epoch(case: Case) -> Iterator[str]:
    """Dropout helps if tokens are repeated. In a run that reads each token at most once, it only slows learning.

    Symptom: the loss is higher than without dropout.
    Fix: set model.dropout: 0.
    """
    once = case.train_tokens is not None and case.run.train.total_tokens <= case.train_tokens
    if once and case.model is not None and case.model.dropout > 0:
        yield (
            f"model.dropout = {case.model.dropout:g}, but the run reads no token twice, so dropout only slows "
            "learning. 0 is usual."
        )


@rule("slow")
def precision_of_another_time(case: Case) -> Iterator[str]:
    """fp32 does not use tensor cores, and fp16 overflows at 65,504. bf16 has neither problem.

    Symptom: the run is several times slower, or skips steps.
    Fix: set train.precision: auto or bf16.
    """
    if case.on_gpu and case.run.train.precision == "fp32":
        yield "train.precision: fp32 on a GPU is several times slower than bf16. Write auto or bf16."
    if case.precision == "fp16":
        yield (
            "train.precision: fp16 overflows at 65,504, and the run then skips steps. bf16 does not. Write auto, or "
            "bf16 if the device supports it."
        )


@rule("slow")
def fp8_is_emulated(case: Case) -> Iterator[str]:
    """CPUs have no 8-bit floating-point arithmetic, so the run rounds to 8 bits and multiplies in fp32.

    Symptom: the run is slower than in bf16 or fp32.
    Fix: use fp8 on GPUs; on CPUs use it only to try out its numerics.
    """
    if case.run.train.precision == "fp8" and not case.on_gpu:
        yield (
            "train.precision: fp8 on a CPU gives the numbers of a GPU, but is slower than bf16 and fp32. Use it only "
            "to try out its numerics."
        )


@rule("useless")
def fp8_settings_unused(case: Case) -> Iterator[str]:
    """train.fp8_skip_blocks is read only if train.precision is fp8.

    Symptom: the setting makes no difference.
    Fix: remove the key, or set train.precision: fp8.
    """
    if "train.fp8_skip_blocks" in case.given and case.run.train.precision != "fp8":
        yield (
            "train.fp8_skip_blocks has an effect with fp8 only, but train.precision is "
            f"{case.run.train.precision}. Remove it."
        )


# ---- checkpoints and logging ----
@rule("unsafe", "goodfire spd#677, #741")
def saved_too_late(case: Case) -> Iterator[str]:
    """The run saves so rarely that a crash loses most of the work.

    Symptom: after a crash the run starts from the beginning.
    Fix: lower checkpoint.every_steps.
    """
    every, steps = case.run.checkpoint.every_steps, case.run.train.total_steps
    if every > steps:
        yield (
            f"checkpoint.every_steps = {every} is more than the run's {steps} steps, so a crash loses all work. Lower "
            f"it."
        )
    elif every == 0 and steps > 1000:
        yield (
            f"checkpoint.every_steps = 0 saves only at the end, so a crash loses up to {steps} steps. Write a number "
            f"of "
            "steps."
        )


@rule("unsafe", "Megatron-LM#4378")
def one_checkpoint(case: Case) -> Iterator[str]:
    """If the only checkpoint is damaged, there is no older one from which to resume.

    Symptom: a resume fails after a disk error.
    Fix: set checkpoint.keep to 2 or more.
    """
    section = case.run.checkpoint
    if section.keep == 1 and section.every_steps and section.keep_every_steps == 0:
        why = ", and with async_write a failed write is detected late" if section.async_write else ""
        yield (
            "checkpoint.keep = 1: if the checkpoint is damaged, there is no older one from which to resume"
            f"{why}. Keep 2 or more."
        )


@rule("unsafe", "PaLM, arXiv:2204.02311, section 5.1")
def nothing_to_rewind_to(case: Case) -> Iterator[str]:
    """A rewind returns to a scheduled checkpoint, but this run saves none before its end.

    Symptom: the run stops at the first anomaly.
    Fix: set checkpoint.every_steps to less than the number of steps, or in the section anomalies write skip instead of
    rewind.
    """
    section = case.run.anomalies
    if (
        "rewind" in (section.nonfinite, section.spike)
        and not 0 < case.run.checkpoint.every_steps < case.run.train.total_steps
    ):
        yield (
            "anomalies: rewind returns to a scheduled checkpoint, but with this checkpoint.every_steps the run saves "
            "none before its end. Lower checkpoint.every_steps."
        )


@rule("useless")
def log_too_rarely(case: Case) -> Iterator[str]:
    """monitor.log_every_steps is more than the steps of the run.

    Symptom: the console shows the first and the last step only.
    Fix: lower monitor.log_every_steps.
    """
    if case.run.monitor.log_every_steps > case.run.train.total_steps > 1:
        yield (
            f"monitor.log_every_steps = {case.run.monitor.log_every_steps} is more than the run's steps, so only the "
            "first and the last step are shown. Lower it."
        )
