"""Expert parallelism in the model: ranks are threads of one process, compared with a layer that has all experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packspeed.launch.checkpoint.expert_files import join_experts
from packspeed.launch.cluster.local_launcher import default_ranks
from packspeed.launch.config.batch import fits, plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import TrainSection
from packspeed.launch.engine.experts import mark_experts
from packspeed.launch.engine.groups import optimizer_groups, set_rates
from packspeed.model.config import GPTConfig
from packspeed.model.expert_parts import ExpertPart
from packspeed.model.gpt import GPT, gpt_without_weights, init_weights
from packspeed.model.moe import is_expert_parameter, moe_layers, share_experts, take_counts
from packspeed.model.mup import scales
from packspeed.model.sequence import SequencePart
from support.workspace import EXPERTS, Workspace
from test_model_sequence import on_ranks

MODEL: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 60, "max_seq_len": 32, "norm": "rmsnorm",
    "position": "rope", "mlp": "swiglu", "bias": False, "n_expert": 6, "n_expert_active": 2, "n_shared_expert": 1,
    "d_expert": 8, "first_dense": 1, "tie_embeddings": False,
}  # fmt: skip


def complete_model(config: GPTConfig, avoided: tuple[int, ...]) -> GPT:
    """A model whose routers prefer some experts and never choose those in `avoided`."""
    model = GPT(config)
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.normal_(0.0, 1.0, generator=generator)
            layer.router.bias[list(avoided)] = -9.0
    return model


def shared_model(complete: GPT, part: ExpertPart) -> GPT:
    """The same model with this rank's experts."""
    model = gpt_without_weights(complete.config)
    share_experts(model, part)
    weights = {
        name: (part.of(value) if is_expert_parameter(name, complete.config) else value).clone()
        for name, value in complete.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("fields", "avoided"),
    [
        ({"kernels": "eager"}, (1,)),
        ({"kernels": "native", "n_expert_active": 1, "n_shared_expert": 0}, (4, 5)),
        ({"kernels": "native", "activation_checkpointing": "full", "mlp": "gelu"}, (2, 3, 4, 5)),
    ],
)
def test_loss_and_gradients_of_shared_experts(size: int, fields: dict[str, Any], avoided: tuple[int, ...]) -> None:
    """Ranks have unequal numbers of rows, and in some cases a rank's experts get none at all."""
    config = GPTConfig(**MODEL | fields)
    complete = complete_model(config, avoided)
    draw = torch.Generator().manual_seed(3)
    tokens = [torch.randint(60, (1 + rank, 9), generator=draw) for rank in range(size)]
    losses = [complete(rows, rows, reduction="sum") for rows in tokens]
    counts = take_counts(complete)
    torch.stack(losses).sum().backward()

    def work(rank: SequencePart) -> tuple[float, torch.Tensor | None, dict[str, torch.Tensor]]:
        model = shared_model(complete, ExpertPart(rank.rank, size, rank.all_to_all))
        loss = model(tokens[rank.rank], tokens[rank.rank], reduction="sum")
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == dict(complete.named_parameters()).keys()
        return float(loss.detach()), take_counts(model), gradients

    found = on_ranks(size, 8, work)
    assert [loss for loss, _, _ in found] == pytest.approx([float(loss.detach()) for loss in losses], rel=1e-6)
    of_ranks = [rank_counts for _, rank_counts, _ in found if rank_counts is not None]
    assert counts is not None
    assert torch.equal(torch.stack(of_ranks).sum(0), counts), "a recomputed layer counts once"
    for name, parameter in complete.named_parameters():
        pieces = [gradients[name] for _, _, gradients in found]
        gradient = torch.cat(pieces) if is_expert_parameter(name, config) else torch.stack(pieces).sum(0)
        torch.testing.assert_close(
            gradient, parameter.grad, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_recomputed_layer_sends_the_rows_where_they_were() -> None:
    """The counts are exchanged once per layer, and the rows four times in the forward and backward pass."""
    config = GPTConfig(**MODEL, kernels="eager", activation_checkpointing="full")
    complete = complete_model(config, ())
    tokens = torch.arange(18).view(2, 9)

    def work(rank: SequencePart) -> list[torch.dtype]:
        used: list[torch.dtype] = []

        def counted(received: torch.Tensor, sent: torch.Tensor, *sizes: list[int]) -> None:
            used.append(sent.dtype)
            rank.all_to_all(received, sent, *sizes)

        model = shared_model(complete, ExpertPart(rank.rank, 2, counted))
        loss = model(tokens, tokens)
        for layer in moe_layers(model):
            layer.router.bias[:2] = 9.0  # the recomputation would choose other experts
        loss.backward()
        return used

    for used in on_ranks(2, 8, work):
        assert used.count(torch.int64) == 1
        assert used.count(torch.float32) >= 4


def test_files_of_experts_are_joined_in_order() -> None:
    tensors = {"fp32": torch.zeros(2, 3), "exp_avg": torch.full((2, 3), 5.0)}
    others = [
        {"weights": {"a": torch.full((2, 3), n)}, "states": {"a": {"exp_avg": torch.ones(2, 3), "step": 1}}}
        for n in (1, 2)
    ]
    joined = join_experts("a", tensors, others)
    assert joined["fp32"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert joined["exp_avg"].shape == (6, 3)
    assert join_experts("b", tensors, others) == tensors


def test_shared_experts_keep_their_rate_decay_and_eps() -> None:
    """They are a group of the optimizer of their own, for DeepSpeed."""
    train = TrainSection.model_validate(
        {"steps": 9, "global_batch_tokens": 8, "optimizer": {"lr": 1e-3, "embedding_lr": 2e-3, "scalar_lr": 3e-3}}
    )
    config = GPTConfig(**MODEL)

    def settings(shared: bool) -> dict[str, tuple[float, float, float]]:
        model, factors = gpt_without_weights(config), scales(config)
        if shared:
            mark_experts(model, ExpertPart(0, 2, lambda *_: None))
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = optimizer_groups(model, train.optimizer)
        assert any(group.get("moe") for group in groups) == shared
        groups = [{"eps": 0.0, **group} for group in groups]
        set_rates(groups, 5, train, factors)
        return {
            names[parameter]: (group["lr"], group["weight_decay"], group["eps"])
            for group in groups
            for parameter in group["params"]
        }

    assert settings(shared=True) == settings(shared=False)


SHARED = ("parallel.expert=4", "parallel.sequence=2", "model.n_expert=8")


def test_sizes_of_expert_groups(workspace: Workspace) -> None:
    def layout(ranks: int, *sets: str) -> Layout:
        return plan_batch(load_run_file(workspace.run_file, [EXPERTS, *sets]), ranks).layout

    assert layout(4, "parallel.expert=2") == Layout(4, expert=2)
    assert str(layout(4, "parallel.expert=2", "parallel.sequence=2")).endswith("2 sequence, experts over 2")
    for ranks, sets, words in (
        (4, ("parallel.expert=4",), "must divide the 6 experts of a layer and the 4 ranks.*do: 1, 2"),
        (2, ("parallel.expert=3",), "the 2 ranks. These sizes do: 1, 2"),
        (2, ("parallel.expert=2", "train.optimizer.name=muon"), "Muon needs complete matrices"),
    ):
        with pytest.raises(ConfigError, match=words):
            layout(ranks, *sets)
    with pytest.raises(ConfigError, match="the model has no experts"):
        plan_batch(load_run_file(workspace.run_file, ["parallel.expert=2"]), 2)
    run = load_run_file(workspace.run_file, [EXPERTS, "parallel.expert=2"])
    assert [fits(run, ranks) for ranks in (1, 2, 4)] == [False, True, True]
    assert default_ranks(run, devices=0) == 2
    assert default_ranks(load_run_file(workspace.run_file, [EXPERTS, *SHARED]), devices=0) == 4
    odd = load_run_file(
        workspace.run_file, [EXPERTS, "parallel.expert=2", f"train.global_batch_tokens={9 * run.data.seq_len}"]
    )
    with pytest.raises(ConfigError, match="9 samples"):  # the supervisor's message if no number of ranks fits
        plan_batch(odd, 2)


def test_settings_of_deepspeed_that_shared_experts_do_not_allow(workspace: Workspace) -> None:
    run = load_run_file(workspace.run_file, [EXPERTS, "parallel.expert=2"])
    plan = plan_batch(run, 2)
    with pytest.raises(ConfigError, match=r"ZeRO-3 with parallel.expert = 2.*Write deepspeed: zero1 or zero2"):
        resolve_ds_config(run, load_ds_config("zero3"), plan, "fp32")
    zero = {
        "stage": 1,
        "reduce_scatter": False,
        "load_from_fp32_weights": False,
        "contiguous_gradients": False,
        "zenflow": {"topk_ratio": 0.1},
    }
    refused = {"zero_optimization": zero, "prescale_gradients": True, "compile": {"deepcompile": True}}
    with pytest.raises(ConfigError) as caught:
        resolve_ds_config(run, refused, plan, "fp32")
    for words in (
        "reduce_scatter",
        "contiguous_gradients",
        "load_from_fp32_weights",
        "zenflow",
        "deepcompile",
        "prescale_gradients",
    ):
        assert words in str(caught.value)
