"""The models with which `packspeed bench --compare` compares Packspeed, in a plain PyTorch loop.

bare        Packspeed's GPT with the same weights, batches, memory allocator and optimizer kernel, but without DeepSpeed
            and the training loop. Its losses are equal to Packspeed's
gpt2        transformers' GPT2LMHeadModel of the same shape, with torch's fused AdamW
nanogpt     model.py of a nanoGPT checkout, with the optimizer that it configures
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.engine.groups import optimizer_groups
from packspeed.launch.engine.ops import adamw_class
from packspeed.launch.training.micro_batch import dropout_keys, micro_batches
from packspeed.launch.trials.bench_setup import BenchSetup, PhaseMarks
from packspeed.model.gpt import GPT, init_weights


@dataclasses.dataclass
class Baseline:
    """A model, the function that computes its loss, and a function that makes its optimizer.

    The optimizer is made later, because it must get the parameters after they have been moved to the device.
    """

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, Tensor, Tensor, Tensor], Tensor]  # of (model, inputs, labels, dropout keys)
    optimizer: Callable[[], torch.optim.Optimizer]


class BaselineLoop:
    """Trains a baseline, a model to compare with, in a plain loop: forward, backward, clip, step.

    Uses DistributedDataParallel if there are several ranks.
    """

    def __init__(self, setup: BenchSetup, name: str, precision: str) -> None:
        """Build the baseline `name` of BASELINES. `precision`: fp32, autocast (fp32 weights, bf16 arithmetic) or
        bf16 (all).
        """
        self.setup, self.marks = setup, PhaseMarks(setup.topology.device)
        device, train = setup.topology.device, setup.run.train
        torch.manual_seed(train.seed)
        baseline = BASELINES[name](setup)
        self.compute_loss = baseline.loss
        self.model = baseline.model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).train()
        self.optimizer = baseline.optimizer()
        if setup.topology.world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast")
        self.batches = setup.batches()
        self.last_loss = torch.zeros((), device=device)

    def step(self) -> None:
        """Take one optimizer step on this rank's rows of the next batch."""
        self.marks("data")
        number, batch = next(self.batches)
        train, plan = self.setup.run.train, self.setup.plan
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, train)
        self.last_loss = torch.zeros_like(self.last_loss)
        for micro in micro_batches(batch, plan.micro_batch, self.setup.topology):
            self.marks("forward")
            keys = dropout_keys(micro.rows.samples, train.seed, self.last_loss.device)
            with self.autocast:
                loss = self.compute_loss(self.model, micro.inputs, micro.labels, keys) / plan.accumulation
            self.marks("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            self.last_loss += loss.detach()
        self.marks("step")
        if train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.marks("other")

    def loss(self) -> float:
        """Return the mean loss over this rank's rows of the last step, in nats per token."""
        return float(self.last_loss)


def _bare(setup: BenchSetup) -> Baseline:
    """Return Packspeed's own GPT, its loss and its optimizer as a baseline."""
    gpt, train = GPT(dataclasses.replace(setup.config, mtp=None)), setup.run.train
    init_weights(gpt, train.seed)

    def loss(model: torch.nn.Module, inputs: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        value: Tensor = model(inputs, labels, dropout_keys=keys)
        return value

    def optimizer() -> torch.optim.Optimizer:
        options, make = train.optimizer, adamw_class(setup.ds_config)
        return make(optimizer_groups(gpt, options), lr=options.lr, betas=options.betas, eps=options.eps)

    return Baseline(gpt, loss, optimizer)


def _gpt2(setup: BenchSetup) -> Baseline:
    """Return a GPT-2 of transformers with the same shape, with torch's fused AdamW, as a baseline."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config, options = setup.config, setup.run.train.optimizer
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.padded_vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.ff_width,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )

    def loss(model: torch.nn.Module, inputs: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).logits.float().flatten(0, 1), labels.flatten())

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            gpt2.parameters(), options.lr, options.betas, options.eps, options.weight_decay, fused=True
        )

    return Baseline(gpt2, loss, optimizer)


def _nanogpt(setup: BenchSetup) -> Baseline:
    """Return nanoGPT's model as a baseline, imported from the checkout in the folder setup.job["nanogpt"]."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(setup.job["nanogpt"]) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, options = setup.config, setup.run.train.optimizer
    nanogpt = module.GPT(
        module.GPTConfig(
            block_size=config.max_seq_len,
            vocab_size=config.padded_vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            dropout=config.dropout,
            bias=config.bias,
        )
    )

    def loss(model: torch.nn.Module, inputs: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        value: Tensor = model(inputs, labels.contiguous())[1]
        return value

    def optimizer() -> torch.optim.Optimizer:
        device = setup.topology.device.type
        made: torch.optim.Optimizer = nanogpt.configure_optimizers(
            options.weight_decay, options.lr, options.betas, device
        )
        return made

    return Baseline(nanogpt, loss, optimizer)


BASELINES: dict[str, Callable[[BenchSetup], Baseline]] = {"bare": _bare, "gpt2": _gpt2, "nanogpt": _nanogpt}
