"""Make each update of DeepSpeed's Adam on CPUs depend only on the step number and on the element's own values.

Why        The C++ kernel keeps beta^t as a product that it multiplies by beta in each step, in fp32. Only if the step
           number jumps, as it does after a resume, does it call pow(beta, t) instead. The two values differ in the last
           bit, and from then on so do all losses.
Version    DeepSpeed 0.19.8, IncrementStep of csrc/includes/cpu_adam.h. Both of DeepSpeed's optimizers for CPUs use it:
           DeepSpeedCPUAdam (for offload) and FusedAdam.
Upstream   No thread is known.
Without    A resumed run differs from an uninterrupted one in the last bits.

Before each step the patch lets the kernel update one dummy number with a distant step number. The next real step is
then always a jump, and the kernel calls pow(beta, t).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.patches.replace import replace, require

FAR_STEP = 2**30  # a step number that no run reaches
VECTOR = 16  # floats in the widest vector of a CPU


def forget_bias_products(basic_optimizer: torch.optim.Optimizer, betas: tuple[float, float]) -> None:
    """Make DeepSpeed's Adam on CPUs compute beta^t by pow(beta, t) in each step, and not as beta * beta^(t-1).

    Patches DeepSpeedCPUAdam and the CPU's FusedAdam; other optimizers are left as they are. `betas` are Adam's two
    decay rates.
    """
    optimizer: Any = basic_optimizer
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(1) for _ in range(4))
    lr, eps, weight_decay, bias_correction = 0.0, 1.0, 0.0, True

    # The arguments of both ops are positional: registry.py holds their C++ signatures.
    def jump_cpu_adam(*_: object) -> None:
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, FAR_STEP, lr, *betas, eps, weight_decay, bias_correction, param, grad, exp_avg, exp_avg_sq
        )

    def jump_fused_adam(*_: object) -> None:
        chunk_size, tensors = 1, [[grad], [param], [exp_avg], [exp_avg_sq]]
        optimizer.multi_tensor_adam(
            chunk_size, optimizer._dummy_overflow_buf, tensors, lr, *betas, eps, FAR_STEP, optimizer.adam_w_mode,
            int(bias_correction), weight_decay,
        )  # fmt: skip

    if isinstance(optimizer, DeepSpeedCPUAdam):
        require(optimizer, "ds_opt_adam")
        optimizer.register_step_pre_hook(jump_cpu_adam)
    elif isinstance(optimizer, FusedAdam) and device_type() == "cpu":
        require(optimizer, "multi_tensor_adam")
        optimizer.register_step_pre_hook(jump_fused_adam)


def update_in_full_vectors(basic_optimizer: torch.optim.Optimizer) -> None:
    """Let FusedAdam on CPUs update the last elements of a tensor with its vector code, too.

    Other optimizers are left as they are. Reason: elements that do not fill a vector are updated by other code,
    which sometimes rounds differently (findings/deepspeed-cpu-adam-tail.sh). Which elements these are depends on
    the ZeRO stage and the number of ranks, and in bf16 the last bit decides how a weight is rounded.
    """
    optimizer: Any = basic_optimizer
    if not isinstance(optimizer, FusedAdam) or device_type() != "cpu":
        return

    def multi_tensor_adam(
        chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *rest: Any
    ) -> None:
        flats = [[tensor.view(-1) for tensor in kind] for kind in tensors]
        mains = [[flat[: flat.numel() // VECTOR * VECTOR] for flat in kind] for kind in flats]
        tails = [[flat[flat.numel() // VECTOR * VECTOR :] for flat in kind] for kind in flats]
        padded = [[torch.nn.functional.pad(tail, (0, VECTOR - tail.numel())) for tail in kind] for kind in tails]
        original(chunk_size, overflow, [main + pad for main, pad in zip(mains, padded, strict=True)], *rest)
        for kind, pads in zip(tails[1:], padded[1:], strict=True):  # not the gradients
            for tail, pad in zip(kind, pads, strict=True):
                tail.copy_(pad[: tail.numel()])

    original = replace(optimizer, "multi_tensor_adam", multi_tensor_adam)
