"""Multi-token prediction: each extra head computes what a plain model with its block as the last layer computes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from packspeed.data.loader import document_positions
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.mtp import future_labels

pytestmark = pytest.mark.slow  # in `make test`, not in `make check`

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 32, "vocab_size": 50, "max_seq_len": 24}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "one layer": {"n_layer": 1},
    "llama": LLAMA | {"qk_norm": True, "n_kv_head": 2, "residual_scale": True},
    "values": LLAMA | {"attention_gate": "headwise", "value_residual": True, "value_embeddings": 2},
    "windows": LLAMA | {"sliding_window": 5, "sliding_window_pattern": 3},
    "losses": {"z_loss": 0.1, "logit_softcap": 2.0, "mup": {"base_width": 16, "base_depth": 2}},
    "recomputed": LLAMA | {"activation_checkpointing": "full", "activation_offload": True, "mlp_chunk": 10},
    "experts": LLAMA | {"n_expert": 4, "d_expert": 16, "first_dense": 1},
}


def build(depth: int = 2, weight: float = 0.6, **fields: Any) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, "mtp": {"depth": depth, "weight": weight}, **fields}))
    init_weights(model, 0)
    return model


def batch(rows: int = 3, length: int = 24) -> tuple[Tensor, Tensor]:
    window = torch.randint(0, 50, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return window[:, :-1], window[:, 1:]


def reference(model: GPT, tokens: Tensor, labels: Tensor, documents: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Return (the loss to train on, the sum of each prediction's losses), in float64, from plain models.

    The model for prediction k has the block of head k as its last layer. Its logits are compared with the token k
    places after the label, which a loop finds.
    """
    config = model.config
    assert config.mtp is not None
    off = {"mtp": None, "activation_checkpointing": "none", "activation_offload": False, "mlp_chunk": None}
    plain = GPT(GPTConfig(**vars(config) | off)).double()
    weights, last = dict(model.named_parameters()) | dict(model.named_buffers()), f"blocks.{config.n_layer - 1}."
    sums = []
    for k in range(config.mtp.depth + 1):
        own = {
            name: weights[name.replace(last, f"blocks.{config.n_layer - 1 + k}.")]
            for name, _ in (*plain.named_parameters(), *plain.named_buffers())
        }
        logits = functional_call(plain, own, (tokens,), documents)
        losses = []
        starts = documents["positions"].tolist() if documents else [list(range(tokens.size(1)))] * len(tokens)
        for row, line in enumerate(labels.tolist()):
            for t in range(len(line) - k):
                same = starts[row][t + k] == starts[row][t] + k
                if same and line[t + k] >= 0:
                    loss = F.cross_entropy(logits[row, t], torch.tensor(line[t + k]))
                    losses.append(loss + config.z_loss * logits[row, t].logsumexp(0) ** 2)
        sums.append(torch.stack(losses).sum())
    return sums[0] + config.mtp.weight / config.mtp.depth * sum(sums[1:], torch.zeros(())), sums


@pytest.mark.parametrize("masked", [False, True], ids=["stream", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_heads_in_float64(case: str, masked: bool) -> None:
    model, (tokens, labels) = build(kernels="eager", **CASES[case]).double(), batch()
    documents: dict[str, Any] = {}
    if masked:
        positions, lengths = document_positions(tokens.numpy() % 9, 4)
        documents = {"positions": torch.from_numpy(positions).long(), "documents": lengths.tolist()}
        labels = labels.clone()
        labels[1, 20:] = -1  # padding
    future = future_labels(labels, 2, documents.get("positions"))
    total, losses = model(tokens, labels, reduction="sum", future=future, **documents)
    expected, sums = reference(model, tokens, labels, documents)
    torch.testing.assert_close(losses, torch.stack(sums).detach())
    torch.testing.assert_close(total, expected)
    assert not losses.requires_grad
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_future_labels_by_hand() -> None:
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -1]])
    assert future_labels(labels, 2)[..., 0].tolist() == [[2, 3, 4, -1], [6, 7, -1, -1]]
    assert future_labels(labels, 2)[..., 1].tolist() == [[3, 4, -1, -1], [7, -1, -1, -1]]
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    assert future_labels(labels, 5, positions)[..., 0].tolist() == [[2, -1, 4, -1], [6, 7, -1, -1]]
    assert (future_labels(labels, 5, positions)[..., 3:] == -1).all()


@pytest.mark.slow
def test_targets_are_megatrons() -> None:
    """Megatron-LM rolls labels and loss mask by one for each head, and inside each sequence if they are packed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.multi_token_prediction import roll_tensor
    rolled = torch.randint(1, 50, (1, 40), generator=torch.Generator().manual_seed(1))
    positions, lengths = document_positions(rolled.numpy() % 9, 4)
    assert min(lengths) < 4 < len(lengths)
    ends = torch.tensor([0, *lengths.cumsum()])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    stream = rolled
    ours = [future_labels(rolled, 4, place).clamp(min=0) for place in (None, torch.from_numpy(positions).long())]
    for k in range(4):
        stream, rolled = roll_tensor(stream)[0], roll_tensor(rolled, packed_seq_params=packed)[0]
        assert torch.equal(ours[0][..., k], stream)
        assert torch.equal(ours[1][..., k], rolled)
