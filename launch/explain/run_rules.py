"""Known troubles of run files: the second half of lint.py's table (importing this module fills it)."""

from __future__ import annotations

from collections.abc import Iterator

from packspeed.launch.explain.rule import Case, rule


# ---- the run file: the learning rate ----
@rule("loss")
def minimum_above_peak(case: Case) -> Iterator[str]:
    """A decay that rises."""
    low, peak = case.run.train.schedule.min_lr, case.run.train.optimizer.lr
    if low > peak and case.run.train.schedule.name != "constant":
        yield f"train.schedule.min_lr = {low:g} is above train.optimizer.lr = {peak:g}: the rate rises to the end."


@rule("loss", "DeepSpeed#7303")
def warmup_is_most_of_the_run(case: Case) -> Iterator[str]:
    """The peak is hardly reached."""
    warmup, total = case.run.train.schedule.warmup_steps, case.run.train.total_steps
    if total > 1 and warmup > total / 4:
        yield (
            f"train.schedule.warmup_steps = {warmup} is {warmup / total:.0%} of the run's {total} steps; 1% to 5% is "
            "usual."
        )


@rule("useless")
def schedule_settings_unused(case: Case) -> Iterator[str]:
    """Settings of another schedule or optimizer."""
    schedule, optimizer = case.run.train.schedule, case.run.train.optimizer
    if schedule.decay_steps is not None and schedule.name != "wsd":
        yield f"train.schedule.decay_steps is wsd's; this is {schedule.name}."
    if schedule.min_lr > 0 and schedule.name == "constant":
        yield "train.schedule.min_lr has no effect with schedule constant."
    for key in ("momentum", "muon_lr"):
        if f"train.optimizer.{key}" in case.given and optimizer.name != "muon":
            yield f"train.optimizer.{key} is Muon's; the optimizer is {optimizer.name}."


@rule("loss")
def decay_longer_than_the_run(case: Case) -> Iterator[str]:
    """wsd: no stable phase is left."""
    schedule, total = case.run.train.schedule, case.run.train.total_steps
    if schedule.name == "wsd" and (schedule.decay_steps or 0) > total - schedule.warmup_steps:
        yield f"train.schedule.decay_steps = {schedule.decay_steps} is more than the {total} steps leave after warm-up."


@rule("loss", "GPT-3, arXiv:2005.14165, table 2.1; Lion, arXiv:2302.06675")
def unusual_learning_rate(case: Case) -> Iterator[str]:
    """Peaks that no published run of the size used."""
    optimizer, n = case.run.train.optimizer, case.parameters or 0
    limit = 2e-3 if n > 50e6 else 2e-2
    if optimizer.name == "adamw" and optimizer.lr > limit:
        yield (
            f"train.optimizer.lr = {optimizer.lr:g} is high for AdamW on {n / 1e6:,.1f} M parameters; GPT-3 125M "
            "used 6e-4."
        )
    if optimizer.name == "lion" and optimizer.lr > 3e-4:
        yield f"train.optimizer.lr = {optimizer.lr:g} with Lion: its paper uses a third to a tenth of AdamW's rate."
    if any(not 0 <= beta < 1 for beta in optimizer.betas):
        yield f"train.optimizer.betas = {list(optimizer.betas)}: both must be at least 0 and less than 1."
    if optimizer.weight_decay > 1:
        yield f"train.optimizer.weight_decay = {optimizer.weight_decay:g} pulls weights to zero faster than they learn."


@rule("loss")
def no_clipping(case: Case) -> Iterator[str]:
    """One bad batch moves the weights as far as it likes."""
    if case.run.train.grad_clip == 0 and case.run.train.optimizer.name != "muon":
        yield "train.grad_clip = 0: nothing limits the step of a bad batch. 1.0 is usual."
    elif case.run.train.grad_clip > 10:
        yield f"train.grad_clip = {case.run.train.grad_clip:g} clips nothing: gradient norms are near 1. 1.0 is usual."


# ---- the run file: data, model and batch ----
@rule("loss", "Muennighoff et al., arXiv:2305.16264")
def too_many_epochs(case: Case) -> Iterator[str]:
    """Beyond four epochs repeated tokens are worth less and less."""
    if case.train_tokens:
        epochs = case.run.train.total_steps * case.run.train.global_batch_tokens / case.train_tokens
        if epochs > 4:
            yield (
                f"the run reads the {case.train_tokens:,} training tokens {epochs:.1f} times; up to 4 is nearly as "
                "good as new data."
            )


@rule("useless")
def evaluation_beyond_the_data(case: Case) -> Iterator[str]:
    """More windows than the validation split has, or an evaluation that never comes."""
    section, steps = case.run.eval, case.run.train.total_steps
    if case.val_tokens is not None and section.every_steps:
        there = max(0, (case.val_tokens - 1) // case.run.data.seq_len)
        if section.windows > there:
            yield (
                f"eval.windows = {section.windows}, but the validation split has {there} windows of "
                f"{case.run.data.seq_len} tokens."
            )
    if section.every_steps > steps:
        yield (
            f"eval.every_steps = {section.every_steps} is more than the run's {steps} steps: only the last is "
            "evaluated."
        )


@rule("slow", "nanoGPT, model.py: vocab_size 50304")
def uneven_vocabulary(case: Case) -> Iterator[str]:
    """Shapes that leave tensor cores idle."""
    model = case.model
    if model is None or not case.on_gpu:
        return
    if model.head_width % 8:
        yield f"heads are {model.head_width} wide, no multiple of 8: fused attention falls back to a slow kernel."
    if model.d_model % 64:
        yield f"model.d_model = {model.d_model} is no multiple of 64: GEMMs run below their speed."


@rule("useless", "packspeed: positions beyond seq_len are never trained")
def untrained_positions(case: Case) -> Iterator[str]:
    """A table of learned positions that the run never reads to its end."""
    model, length = case.model, case.run.data.seq_len
    if model is not None and model.position == "learned" and model.max_seq_len > length:
        yield (
            f"model.max_seq_len = {model.max_seq_len}, but samples have {length} tokens: positions {length} and on "
            "keep "
            "their random start, and text generated there is noise. Lower it, raise data.seq_len, or position: rope."
        )


@rule("slow")
def small_micro_batches(case: Case) -> Iterator[str]:
    """Many small passes where few large ones would do."""
    tokens = case.micro_batch * case.run.data.seq_len
    if case.accumulation >= 16 and tokens < 4096 and case.run.train.micro_batch != "auto":
        yield (
            f"train.micro_batch = {case.micro_batch} makes {case.accumulation} passes of {tokens} tokens a step. "
            "Leave it out (auto), or raise it as memory allows."
        )


@rule("loss")
def dropout_in_one_epoch(case: Case) -> Iterator[str]:
    """Dropout helps against repetition; without it it only costs."""
    if case.model is not None and case.model.dropout > 0 and case.train_tokens:
        tokens = case.run.train.total_steps * case.run.train.global_batch_tokens
        if tokens <= case.train_tokens:
            yield (
                f"model.dropout = {case.model.dropout:g} in a run that reads no token twice: it only slows learning. "
                "0 is usual."
            )


@rule("slow")
def precision_of_another_time(case: Case) -> Iterator[str]:
    """fp32 or fp16 on a GPU that has bf16."""
    if case.on_gpu and case.run.train.precision == "fp32":
        yield "train.precision: fp32 on a GPU is several times slower than bf16. Write auto or bf16."
    if case.precision == "fp16":
        yield (
            "train.precision: fp16 overflows at 65,504 and skips steps; bf16 does not. Write auto or bf16 where "
            "there is bf16."
        )


# ---- the run file: saving and watching ----
@rule("unsafe", "goodfire spd#677, #741")
def saved_too_late(case: Case) -> Iterator[str]:
    """A crash costs everything since the last save."""
    every, steps = case.run.checkpoint.every_steps, case.run.train.total_steps
    if every > steps:
        yield f"checkpoint.every_steps = {every} is more than the run's {steps} steps: a crash loses all of it."
    elif every == 0 and steps > 1000:
        yield f"checkpoint.every_steps = 0 saves at the end only: a crash loses up to {steps} steps."


@rule("unsafe", "Megatron-LM#4378")
def one_checkpoint(case: Case) -> Iterator[str]:
    """Nothing to walk back to."""
    section = case.run.checkpoint
    if section.keep == 1 and section.every_steps and section.keep_every_steps == 0:
        why = ", and a background write that fails is noticed late" if section.async_write else ""
        yield (
            f"checkpoint.keep = 1: if the newest one is damaged there is no other to walk back to{why}. Keep 2 or more."
        )


@rule("unsafe", "PaLM, arXiv:2204.02311, section 5.1")
def nothing_to_rewind_to(case: Case) -> Iterator[str]:
    """anomalies: rewind without scheduled checkpoints."""
    section = case.run.anomalies
    if (
        "rewind" in (section.nonfinite, section.spike)
        and not 0 < case.run.checkpoint.every_steps < case.run.train.total_steps
    ):
        yield (
            "anomalies: rewind goes back to a scheduled checkpoint, and checkpoint.every_steps makes none before the "
            "end."
        )


@rule("useless")
def log_too_rarely(case: Case) -> Iterator[str]:
    """A screen that shows two lines."""
    if case.run.monitor.log_every_steps > case.run.train.total_steps > 1:
        yield (
            f"monitor.log_every_steps = {case.run.monitor.log_every_steps} is more than the run's steps: only the "
            "first and last show."
        )
