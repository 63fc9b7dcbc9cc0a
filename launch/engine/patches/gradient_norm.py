"""One gradient norm at every ZeRO stage, and a veto before the optimizer steps.

Why        DeepSpeed computes the norm in fp32 at some ZeRO stages and from fp64 copies at others. On a CPU, torch's
           fp32 norm of one large tensor is off by 1e-3 at 19 million elements and by 8e-3 at 80 million. The error
           depends on how the gradients are split into tensors, so clipping would depend on the stage and the number of
           ranks. The fp64 copies take twice the gradients' memory and three times as long. Stage 0 also clips by
           another formula. And DeepSpeed has no hook that shows the norm to the caller before the optimizer steps.
Version    DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py and _take_model_step of
           runtime/engine.py.
Upstream   github.com/deepspeedai/DeepSpeed/issues/7837 (norms differ between stages), issues/7749 (between versions),
           github.com/pytorch/pytorch/issues/151761 and 68326 (the fp32 norm on CPUs).
The norm   engine/norms.py: on CPUs rows of 4,096 elements in fp32, then their sums in fp64; on GPUs torch's foreach
           norm; with bf16 weights at ZeRO 1 to 3 everything in fp64.
Without    Losses differ between stages and numbers of ranks, grad_norm in the metrics is not comparable between them,
           and a NaN or a loss spike is detected only after the optimizer has applied it to the weights.

How a veto works, with the functions in the order in which they are called:

    train_step()                     loop: hook.begin_step(), forward and backward, hook.agree(), then engine.step()
      engine.step()                  DeepSpeed: at the accumulation boundary it runs the optimizer
        optimizer.step()             DeepSpeed: computes the norm of the gradients for clipping
          scaled_global_norm()       here (stage 3: get_norm_groups): adds up the norm by get_grad_norm_direct, calls
            hook.read_and_judge()    here: copies norm and agreement to the CPU, stores them for the metrics and calls
              judge(norm, agreed)    AnomalyDetector.vetoes (training/anomaly.py): True if norm or loss is not finite or
                                     is a spike
          <- an invalid norm         returned to DeepSpeed, which then drops the gradients and does not step. At stages
                                     1 to 3 it is -1, DeepSpeed's own mark for an overflow. Stage 0 has no norm
                                     function: the hook replaces optimizer.step, and skips it
    train_step()                     loop: reads hook.norm, hook.read_agreement() and the detector's anomaly

"Agreement" is the all-reduced loss and other numbers (training/agreement.py). This copy is the only point of a step at
which the CPU waits for the GPU. DeepSpeed alone waits in its overflow check and whenever it reads the norm. Here it
gets the norm in host memory, where reading costs nothing. The overflow check is left out, because a gradient that is
not finite makes the norm not finite. In fp16 this counts as an overflow, which lowers the loss scale, and not as an
anomaly. With an offloaded optimizer, the CPU waits for the gradients.

All ranks have the same norm and the same mean loss, so all of them veto a step or none. With an offloaded optimizer
DeepSpeed's own norms of single gradients are used, because they are in fp64 already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.engine.norms import (
    Group,
    TensorGroup,
    clip_factor,
    finite_or_minus_1,
    global_norm,
    offloaded_square_sum,
    square_sum,
)
from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer

Tensors = list[torch.Tensor]


class Stage12Optimizer(ScaledOptimizer, Protocol):
    """The attributes of DeepSpeed's optimizer for ZeRO stages 1 and 2 that GradientNormHook reads or sets."""

    dp_process_group: torch.distributed.ProcessGroup
    check_grad_overflow: bool  # whether an invalid norm drops a step in bf16
    clip_grad: float  # limit of the norm; 0: no clipping
    norm_for_param_grads: dict[int, torch.Tensor]  # with offload: of the gradient of each parameter, by its id

    def get_param_id(self, param: torch.Tensor) -> int:
        """Return the id that DeepSpeed has given to the parameter: the key of norm_for_param_grads."""


class Stage3Optimizer(ScaledOptimizer, Protocol):
    """The attributes of DeepSpeed's optimizer for ZeRO stage 3 that GradientNormHook reads."""

    clip_grad: float  # limit of the norm; 0: no clipping
    fp32_partitioned_groups_flat: Tensors  # this rank's slices of the weights, with their gradients
    norm_for_param_grads: dict[int, torch.Tensor]  # with offload: of the gradient of each parameter, by its id

    def get_param_id(self, param: torch.Tensor) -> int:
        """Return the id that DeepSpeed has given to the parameter: the key of norm_for_param_grads."""

    def _get_param_partition_group(self, param: torch.Tensor) -> torch.distributed.ProcessGroup:
        """Return the group of ranks over which the parameter is partitioned."""


class GradientNormHook:
    """Patches an engine so that each step's gradient norm can be read, and so that `judge` can cancel the step.

    During engine.step() the hook stores the global L2 norm before clipping in `norm` (NaN if it is not finite) and
    calls judge(norm, numbers). `numbers` are those that the training loop has passed to agree(), such as the loss. If
    judge returns True, the optimizer does not step, and `vetoed` is True until begin_step(). In fp16 a norm that is not
    finite is an overflow; the call is then judge(None, numbers). `tensor_group` has the tensor-parallel ranks, or is
    None without tensor parallelism.
    """

    def __init__(
        self,
        engine: Engine,
        judge: Callable[[float | None, Sequence[float]], bool],
        tensor_group: TensorGroup | None = None,
    ) -> None:
        self.judge, self.tensor_group = judge, tensor_group
        # `exact` makes square_sum add in fp64. Then the fp32 norm has the same bits however ranks and ZeRO stage split
        # the gradients. In bf16 its last bit, through clipping, decides how weights are rounded.
        self.exact = engine.bfloat16_enabled()
        self.norm = float("nan")
        self.vetoed = False
        self._agreement: torch.Tensor | None = None
        self._agreed: list[float] | None = None  # the numbers of _agreement, once they are on the host
        self._scales_loss = engine.fp16_enabled()
        optimizer: Any = engine.optimizer  # DeepSpeed's classes have no types. The optimizer keeps the patch alive
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            _Stage3(self, optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            _Stages12(self, optimizer)
        else:
            _Stage0(self, engine)

    def begin_step(self) -> None:
        """Reset `norm`, `vetoed` and the numbers of agree(). Call it before the first forward pass of a step."""
        self.norm, self.vetoed = float("nan"), False
        self._agreement = self._agreed = None

    def agree(self, agreement: torch.Tensor) -> None:
        """Store the numbers that `judge` gets besides the norm, such as the loss. Call it before engine.step().

        `agreement` is an fp64 tensor of shape (n,) on the device, and equal on all ranks.
        """
        self._agreement = agreement

    def read_agreement(self) -> list[float]:
        """Return the numbers passed to agree(). Waits for the device, unless this step's norm was already copied."""
        if self._agreed is None:
            assert self._agreement is not None, "call agree() first"
            self._agreed = self._agreement.tolist()
        return self._agreed

    def read_and_judge(self, norms: Tensors, scale: float = 1.0) -> Tensors | None:
        """Copy the norms to host memory, store the total norm, and call `judge`. Returns the copies.

        Returns None if the optimizer must not step: if `judge` returns True, or after an fp16 overflow. `norms` has one
        scalar per parameter group, multiplied by the loss scale (`scale`). The copies are multiplied too, the stored
        norm is not. A negative scalar is DeepSpeed's mark for "not finite"; the stored norm is then NaN.
        """
        on_host = self._to_host(norms)
        value = float(combine_grad_norm_groups(on_host)) if len(on_host) > 1 else float(on_host[0])
        if self._scales_loss and not 0 <= value < float("inf"):
            self.vetoed = self.judge(None, self.read_agreement())
            return None
        self.norm = value / scale if value >= 0 else float("nan")
        self.vetoed = self.judge(self.norm, self.read_agreement())
        return None if self.vetoed else on_host

    def _to_host(self, norms: Tensors) -> Tensors:
        """Return scalar norms as CPU tensors. The same copy brings the numbers passed to agree() to the CPU."""
        if self._agreement is None or norms[0].device != self._agreement.device:
            return [torch.tensor(float(norm), dtype=norm.dtype) for norm in norms]
        numbers: list[float] = torch.cat([*(norm.double().view(1) for norm in norms), self._agreement]).tolist()
        self._agreed = numbers[len(norms) :]
        return [torch.tensor(number, dtype=norm.dtype) for number, norm in zip(numbers, norms, strict=False)]

    def groups(self, zero_group: Group) -> list[Group]:
        """Return the groups over which the norm is summed: the ZeRO group and, if there is one, the tensor-parallel
        group.
        """
        return [zero_group] if self.tensor_group is None else [zero_group, self.tensor_group.group]

    def counted(self, values: Tensors, params: Tensors) -> Tensors:
        """Return the values that this rank must add to the norm. values[i] belongs to params[i].

        Without tensor parallelism these are all values. Otherwise only one rank adds those of replicated parameters.
        """
        return values if self.tensor_group is None else self.tensor_group.counted(values, params)


class _ZeroPatch:
    """Patches DeepSpeed's ZeRO optimizer for a GradientNormHook.

    A method of this class or of its subclasses replaces the method of the optimizer that has the same name, up to a
    leading underscore, and takes the same parameters.
    """

    def __init__(self, hook: GradientNormHook, optimizer: ScaledOptimizer) -> None:
        self.hook, self.optimizer = hook, optimizer
        self._original_update_scale = replace(optimizer, "_update_scale", self.update_scale)

    def update_scale(self, has_overflow: bool = False) -> None:
        """Adapt the fp16 loss scale. Does nothing if `judge` has cancelled the step, because that is no overflow."""
        if not self.hook.vetoed:
            self._original_update_scale(has_overflow)


class _Stages12(_ZeroPatch):
    """The patch for ZeRO-1 and 2. The optimizer's step() calls scaled_global_norm, and drops the step if that is -1."""

    optimizer: Stage12Optimizer

    def __init__(self, hook: GradientNormHook, optimizer: Stage12Optimizer) -> None:
        super().__init__(hook, optimizer)
        self._original_norm = replace(optimizer, "scaled_global_norm", self.scaled_global_norm)
        for name in (
            "get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload", "unscale_and_clip_grads",
            "check_overflow", "update_offload_overflow_tracker",
        ):  # fmt: skip
            replace(optimizer, name, getattr(self, name))
        replace(optimizer, "check_grad_overflow", True)

    def scaled_global_norm(self, norm_type: int = 2) -> torch.Tensor:
        """Return the norm times the loss scale, or -1 to drop the step."""
        norms = self.hook.read_and_judge([self._original_norm(norm_type)], self.optimizer.loss_scale)
        return torch.tensor(-1.0) if norms is None else norms[0]

    def get_grad_norm_direct(self, gradients: Tensors, params: Tensors, norm_type: int = 2) -> torch.Tensor:
        """Return the norm of the gradients of one parameter group, over all ranks."""
        # The list also contains tensors that only pad the partition. DeepSpeed's own norm skips them too.
        held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        groups = self.hook.groups(self.optimizer.dp_process_group)
        return global_norm(self.hook.counted(held, params), groups, self.hook.exact)

    def complete_grad_norm_calculation_for_cpu_offload(self, params: Tensors) -> torch.Tensor:
        """Return the norm of the gradients of one parameter group, over all ranks, if they are in host memory."""
        norms = _norms_of(self.optimizer, self.hook.counted(params, params))
        total = offloaded_square_sum(norms, self.hook.groups(self.optimizer.dp_process_group))
        return finite_or_minus_1(total.double().sqrt().float())  # as DeepSpeed does; at stage 3 it does not

    def unscale_and_clip_grads(self, grad_groups_flat: Tensors, total_norm: torch.Tensor) -> None:
        """Divide the gradients by the loss scale, and clip them."""
        _unscale_and_clip(grad_groups_flat, total_norm, self.optimizer.loss_scale, self.optimizer.clip_grad)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Do nothing: the norm itself shows an overflow, because it is not finite then."""

    def update_offload_overflow_tracker(self, grad: torch.Tensor) -> None:
        """Do nothing: the norm itself shows an overflow, because it is not finite then."""


class _Stage3(_ZeroPatch):
    """The patch for ZeRO-3: the optimizer's step() checks for an overflow, then calls _get_norm_groups."""

    optimizer: Stage3Optimizer

    def __init__(self, hook: GradientNormHook, optimizer: Stage3Optimizer) -> None:
        super().__init__(hook, optimizer)
        self._original_norm_groups = replace(optimizer, "_get_norm_groups", self.get_norm_groups)
        check = self.overflow_check_and_loss_scale_update
        replace(optimizer, "_overflow_check_and_loss_scale_update", check)
        for name in (
            "get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload", "unscale_and_clip_grads",
        ):  # fmt: skip
            replace(optimizer, name, getattr(self, name))

    def get_norm_groups(self) -> Tensors:
        """Return the norm of each parameter group times the loss scale, or [-1] to drop the step."""
        norms = self.hook.read_and_judge(list(self._original_norm_groups()), self.optimizer.loss_scale)
        return [torch.tensor(-1.0)] if norms is None else norms

    def get_grad_norm_direct(self, gradients: Tensors, params: Tensors, norm_type: int = 2) -> torch.Tensor:
        """Return the norm of the gradients of one parameter group, over all ranks."""
        groups = self.hook.groups(self.optimizer._get_param_partition_group(params[0]))
        return global_norm(self.hook.counted(gradients, params), groups, self.hook.exact)

    def complete_grad_norm_calculation_for_cpu_offload(self, params: Tensors) -> torch.Tensor:
        """Return the norm of the gradients of one parameter group, over all ranks, if they are in host memory."""
        groups = self.hook.groups(self.optimizer._get_param_partition_group(params[0]))
        norms = _norms_of(self.optimizer, self.hook.counted(params, params))
        return finite_or_minus_1(offloaded_square_sum(norms, groups).sqrt())

    def overflow_check_and_loss_scale_update(self, update_scale: bool = True) -> bool:
        """Return False, whatever `update_scale` is: no overflow is known yet.

        It replaces DeepSpeed's check, which reads all gradients once more. get_norm_groups finds an overflow from the
        norms, and updates the loss scale there.
        """
        self.optimizer.overflow = False
        return False

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Divide the gradients of a sub-group by the loss scale, and clip them."""
        gradient = self.optimizer.fp32_partitioned_groups_flat[sub_group_id].grad
        assert gradient is not None, "step() has just filled it"
        _unscale_and_clip([gradient], total_norm, self.optimizer.loss_scale, self.optimizer.clip_grad)


class _Stage0:
    """The patch for an engine without ZeRO.

    Without ZeRO, DeepSpeed clips with torch's norm, then runs the plain optimizer, and has no way to drop a step.
    """

    def __init__(self, hook: GradientNormHook, engine: Any) -> None:
        self.hook, self.engine = hook, engine
        require(engine, "clip_fp32_gradients")
        self._original_take_model_step = replace(engine, "_take_model_step", self.take_model_step)
        self._original_step = replace(engine.optimizer, "step", self.step)

    def take_model_step(self, lr_kwargs: object) -> None:
        """Compute the norm, call the hook's `judge`, then let DeepSpeed clip by this norm and call step()."""
        held = [p for p in self.engine.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in held]
        total = square_sum(self.hook.counted(gradients, held))
        if self.hook.tensor_group is not None:
            dist.all_reduce(total, group=self.hook.tensor_group.group)
        norm = total.sqrt().float()
        self.hook.read_and_judge([norm])
        # The original calls clip_fp32_gradients, then optimizer.step, both replaced.
        limit = self.engine.gradient_clipping()
        self.engine.clip_fp32_gradients = lambda: torch._foreach_mul_(gradients, clip_factor(norm, limit))
        self._original_take_model_step(lr_kwargs)
        del self.engine.clip_fp32_gradients  # it keeps the gradients in memory

    def step(self, *args: object, **kwargs: object) -> object:
        """Take a step of the plain optimizer, unless the hook's `judge` has cancelled it."""
        return None if self.hook.vetoed else self._original_step(*args, **kwargs)


def _norms_of(optimizer: Stage12Optimizer | Stage3Optimizer, params: Tensors) -> Tensors:
    """Return the norms of these parameters' offloaded gradients, as scalars. Parameters without a norm are left out.

    DeepSpeed computed them on the device before it copied the gradients to the host.
    """
    ids = (optimizer.get_param_id(param) for param in params)
    return [optimizer.norm_for_param_grads[number] for number in ids if number in optimizer.norm_for_param_grads]


def _unscale_and_clip(gradients: Tensors, norm: torch.Tensor, scale: float, limit: float) -> None:
    """Divide gradients in place by the loss scale, and scale them down if their norm is above `limit` (0: never).

    `norm` is the norm of all gradients together, still multiplied by the loss scale `scale`.
    """
    if limit > 0:
        factor: torch.Tensor | float = clip_factor(norm / scale, limit) / scale
    else:
        factor = 1.0 / scale
    if not (isinstance(factor, torch.Tensor) and factor.is_cuda) and factor == 1.0:
        return  # a GPU would have to be waited for
    for gradient in gradients:
        gradient.mul_(factor)
