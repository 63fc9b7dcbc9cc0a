"""Baselines."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.ops.adam import FusedAdam
from torch.nn import functional as F

from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.engine.hardware import keep_memory
from packspeed.launch.training.micro_batch import dropout_keys, micro_batches
from packspeed.launch.trials.bench_worker import Arena, Marks
from packspeed.model.gpt import GPT, init_weights, param_groups


class Contender(Protocol):
    """Something that trains."""

    marks: Marks

    def step(self) -> None:
        """Take one optimizer step."""

    def loss(self) -> float:
        """Loss of the last step, nats per token of this rank's rows."""


class Peer:
    """A model and an optimizer in a plain loop: forward, backward, clip, step."""

    def __init__(self, arena: Arena, name: str, precision: str) -> None:
        self.arena, self.marks = arena, Marks(arena.topology.device)
        device, train = arena.topology.device, arena.run.train
        torch.manual_seed(train.seed)
        model, self.compute, optimizer = PEERS[name](arena)
        self.model = model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).train()
        self.optimizer: torch.optim.Optimizer = optimizer(self.model)
        if arena.topology.world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast")
        self.batches = arena.batches()
        self.last = torch.zeros((), device=device)

    def step(self) -> None:
        """The textbook's."""
        self.marks("data")
        number, batch = next(self.batches)
        train, plan = self.arena.run.train, self.arena.plan
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, train)
        self.last = torch.zeros_like(self.last)
        for micro in micro_batches(batch, plan.micro_batch, self.last.device):
            self.marks("forward")
            keys = dropout_keys(micro.rows.samples, train.seed, self.last.device)
            with self.autocast:
                loss = self.compute(self.model, micro.inputs, micro.labels, keys) / plan.accumulation
            self.marks("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            self.last += loss.detach()
        self.marks("step")
        if train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.marks("other")

    def loss(self) -> float:
        """Mean over this rank's rows."""
        return float(self.last)


Built = tuple[torch.nn.Module, Callable[..., torch.Tensor], Callable[[torch.nn.Module], torch.optim.Optimizer]]


def _bare(arena: Arena) -> Built:
    keep_memory()  # as ours does
    model, train = GPT(arena.config), arena.run.train
    init_weights(model, train.seed)

    def compute(model: Any, inputs: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(inputs, labels, dropout_keys=keys)
        return loss

    def optimizer(built: Any) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {
            "lr": train.optimizer.lr,
            "betas": train.optimizer.betas,
            "eps": train.optimizer.eps,
        }
        missing = arena.ds_config["optimizer"]["params"].get("torch_adam")
        kind = functools.partial(torch.optim.AdamW, fused=True) if missing else FusedAdam  # as in packspeed's engine
        found: torch.optim.Optimizer = kind(param_groups(built, train.optimizer.weight_decay), **settings)
        return found

    return model, compute, optimizer


def _gpt2(arena: Arena) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config, settings = arena.config, arena.run.train.optimizer
    model = GPT2LMHeadModel(
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

    def compute(model: Any, inputs: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(inputs).logits.float().flatten(0, 1), labels.flatten())

    def optimizer(built: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            built.parameters(), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True
        )

    return model, compute, optimizer


def _nanogpt(arena: Arena) -> Built:
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(arena.job["nanogpt"]) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    config, settings = arena.config, arena.run.train.optimizer
    model = nanogpt.GPT(
        nanogpt.GPTConfig(
            block_size=config.max_seq_len,
            vocab_size=config.padded_vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            dropout=config.dropout,
            bias=config.bias,
        )
    )

    def compute(model: Any, inputs: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(inputs, labels.contiguous())[1]
        return loss

    def optimizer(built: Any) -> torch.optim.Optimizer:
        device = arena.topology.device.type
        found: torch.optim.Optimizer = built.configure_optimizers(
            settings.weight_decay, settings.lr, settings.betas, device
        )
        return found

    return model, compute, optimizer


PEERS: dict[str, Callable[[Arena], Built]] = {"bare": _bare, "gpt2": _gpt2, "nanogpt": _nanogpt}
