"""Muon without DeepSpeed: its numbers against torch.optim.Muon and float64, its exchanges among threads as ranks."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packspeed.launch.config.run_file import OptimizerSection, RunFile
from packspeed.launch.config.schedule import learning_rate, momentum, weight_decay
from packspeed.launch.engine import muon
from packspeed.launch.engine.groups import MATRICES, optimizer_groups, set_rates
from packspeed.launch.engine.muon import Matrix, Muon, Round, iteration, orthogonalise, overlap, rounds, share_out
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, is_muon_parameter, stacked_matrices

SHAPES = ((24, 8), (8, 24), (16, 16), (1, 5))


def exact(update: torch.Tensor, steps: int) -> torch.Tensor:
    """The published iteration, in float64: X <- a X + (b A + c A A) X with A = X X^T."""
    x = update.double() if update.size(0) <= update.size(1) else update.double().T
    x = x / x.norm()
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if update.size(0) <= update.size(1) else x.T


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_the_published_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalise(matrix, iteration("quintic", 5))
    torch.testing.assert_close(found.double(), exact(matrix, 5), atol=2e-6, rtol=1e-5)
    assert torch.equal(orthogonalise(torch.zeros(shape), iteration("quintic", 5)), torch.zeros(shape))
    assert torch.equal(orthogonalise(1e-20 * matrix, iteration("quintic", 1)).isfinite(), torch.ones(shape).bool())


@pytest.mark.parametrize(("name", "steps", "low", "high"), [("quintic", 5, 0.3, 1.25), ("polar_express", 5, 0.8, 1.2)])
def test_singular_values_end_close_to_one(name: str, steps: int, low: float, high: float) -> None:
    """From 0.003 of the norm on; below, quintic is not done yet."""
    values = torch.logspace(-2.5, -0.1, 32, dtype=torch.float64)
    values = values / values.norm().clamp(min=1)
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(48, 32, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    found = torch.linalg.svdvals(orthogonalise(left @ values.diag() @ right.T, iteration(name, steps)))[:32]
    assert low < float(found.min()) <= float(found.max()) < high
    more = torch.linalg.svdvals(orthogonalise(left @ values.diag() @ right.T, iteration("polar_express", 9)))[:32]
    assert more.tolist() == pytest.approx([1.0] * 32, abs=1e-3)


def one_rank(
    parameters: list[torch.nn.Parameter], settings: OptimizerSection, products: torch.dtype = torch.float32
) -> Muon:
    """Muon over complete matrices, in one process without a process group."""
    groups: list[dict[str, Any]] = [
        {"name": MATRICES, "params": parameters, "weight_decay": settings.weight_decay},
        {"name": "no_decay", "params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, functools.partial(torch.optim.AdamW, lr=settings.lr), settings, products)
    matrices = [Matrix(*p.shape, flat=p, offset=0, held=[(0, p.numel())]) for p in parameters]
    optimizer.rounds = {parameters[0]: [Round(matrices, 0, True, None)]}
    return optimizer


@pytest.mark.parametrize(("scale", "adjust"), [("shape", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torchs_muon_bit_for_bit(scale: Any, adjust: str, nesterov: bool) -> None:
    """torch computes the products in bf16 on every device, Packspeed in bf16 runs and on accelerators."""
    generator = torch.Generator().manual_seed(3)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = OptimizerSection(name="muon", lr=0.02, momentum=0.9, update_scale=scale, nesterov=nesterov)
    a = one_rank(ours, settings, torch.bfloat16)
    b = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust, eps=muon.EPS
    )
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], torch.zeros_like(ours[0]))


def test_the_adam_inside_has_the_bits_of_adam_alone() -> None:
    """Also after its state was loaded, which gives a torch optimizer new groups and a new dict of states."""
    settings, generator = OptimizerSection(name="muon"), torch.Generator().manual_seed(4)
    inside = one_rank([torch.nn.Parameter(torch.zeros(4, 4))], settings)
    vector = inside.param_groups[1]["params"][0]
    alone = torch.nn.Parameter(vector.detach().clone())
    adam = torch.optim.AdamW([alone], lr=settings.lr, weight_decay=0.0)
    for step in range(6):
        inside.param_groups[0]["params"][0].grad = torch.randn(4, 4, generator=generator)
        vector.grad = torch.randn(3, generator=generator)
        alone.grad = vector.grad.clone()
        inside.step()
        adam.step()
        assert torch.equal(vector, alone), step
        inside.load_state_dict(inside.state_dict())
    assert set(inside.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(inside.state[inside.param_groups[0]["params"][0]]) == {"momentum_buffer"}


class Mail:
    """all_to_all_single among threads: each puts its pieces into boxes, waits for all, and takes those for it."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.rank = threading.Barrier(ranks), threading.local()
        self.boxes: dict[tuple[int, int], torch.Tensor] = {}

    def all_to_all_single(
        self, output: torch.Tensor, sent: torch.Tensor, received: list[int], sizes: list[int], group: object
    ) -> None:
        own = self.rank.value
        for other, piece in enumerate(torch.split(sent, sizes)):
            self.boxes[own, other] = piece.clone()
        self.barrier.wait(30)
        pieces = [self.boxes[other, own] for other in range(len(sizes))]
        assert [piece.numel() for piece in pieces] == received
        output.copy_(torch.cat(pieces))
        self.barrier.wait(30)


def cut(cuts: list[int], start: int, numel: int) -> list[tuple[int, int]]:
    """What the ranks hold of the matrix at [start, start + numel), if `cuts` are the ends of their slices."""
    return [overlap((a, b - a), start, numel) for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]


@pytest.mark.parametrize("replicated", [False, True])
def test_three_ranks_update_as_one(monkeypatch: pytest.MonkeyPatch, replicated: bool) -> None:
    """Slices that cut matrices anywhere; one rank has a single element of a matrix, one matrix is on all ranks."""
    total = sum(a * b for a, b in SHAPES)
    cuts = [193, 450, total] if not replicated else [total]
    flat = torch.randn(total, generator=torch.Generator().manual_seed(5))
    starts = [sum(a * b for a, b in SHAPES[:i]) for i in range(len(SHAPES))]
    places = [cut(cuts, start, a * b) * (3 if replicated else 1) for start, (a, b) in zip(starts, SHAPES, strict=True)]
    assert all(len(place) == 3 for place in places)
    mail, results = Mail(3), [torch.zeros(total) for _ in range(3)]
    monkeypatch.setattr(muon.dist, "all_to_all_single", mail.all_to_all_single)
    threads = torch.get_num_threads()

    def work(rank: int) -> None:
        mail.rank.value = rank
        torch.set_num_threads(threads)
        matrices = []
        for start, (rows, columns), held in zip(starts, SHAPES, places, strict=True):
            matrices.append(Matrix(rows, columns, flat, start + held[rank][0], held))
        part = Round(matrices, rank, replicated, None)
        complete = part.collect(lambda m: m.part(flat, rank), Matrix.elements, torch.float32)
        found = {
            m: orthogonalise(x.view(m.rows, m.columns), iteration("quintic", 5)).reshape(-1)
            for m, x in complete.items()
        }
        for matrix, direction in part.distribute(found, Matrix.elements, torch.float32):
            matrix.part(results[rank], rank).copy_(direction)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    expected = [
        orthogonalise(flat[s : s + a * b].view(a, b), iteration("quintic", 5)).reshape(-1)
        for s, (a, b) in zip(starts, SHAPES, strict=True)
    ]
    for rank, result in enumerate(results):
        if replicated:
            assert torch.equal(result, torch.cat(expected)), rank
    if not replicated:
        assert torch.equal(sum(results, torch.zeros(total)), torch.cat(expected))


def test_rows_equalise_as_published() -> None:
    """NorMuon: O / sqrt(running mean of O^2 per row), rescaled to O's norm; in float64, over three steps."""
    generator, beta = torch.Generator().manual_seed(6), 0.95
    squares, mean = torch.zeros(5), torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        update = torch.randn(5, 7, generator=generator) * torch.arange(1, 6)[:, None]
        found, squares = muon.equalise_rows(update, squares, beta)
        exact = update.double()
        mean = beta * mean + (1 - beta) * exact.square().mean(1)
        expected = exact / mean.sqrt()[:, None]
        torch.testing.assert_close(found.double(), expected * exact.norm() / expected.norm(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(squares.double(), mean, atol=0, rtol=1e-5)
    assert torch.equal(muon.equalise_rows(torch.zeros(2, 2), torch.zeros(2), beta)[0], torch.zeros(2, 2))


def test_every_row_begins_on_one_rank_and_is_known_where_it_is_touched() -> None:
    matrix = Matrix(6, 5, torch.empty(0), 0, [(0, 7), (7, 1), (8, 0), (8, 17), (25, 5)])
    begun = [list(range(6))[matrix.begun_rows(rank)] for rank in range(5)]
    assert begun == [[0, 1], [], [], [2, 3, 4], [5]]
    assert [list(range(6))[matrix.touched_rows(rank)] for rank in range(5)] == [[0, 1], [1], [], [1, 2, 3, 4], [5]]


def test_work_is_shared_equally_and_in_rounds() -> None:
    sizes = [(64, 64)] * 5 + [(64, 256)] * 5 + [(8, 8)] * 7
    matrices = [Matrix(a, b, torch.empty(0), 0, [(0, 0)] * 4) for a, b in sizes]
    of_owner = share_out(matrices, 4)
    assert sorted(id(matrix) for mine in of_owner for matrix in mine) == sorted(map(id, matrices))
    work = [sum(matrix.cost for matrix in mine) for mine in of_owner]
    assert max(work) - min(work) <= max(matrix.cost for matrix in matrices)
    pieces = rounds(matrices, 64 * 256)
    assert [matrix for piece in pieces for matrix in piece] == matrices
    assert all(sum(m.numel for m in piece) <= 64 * 256 for piece in pieces)
    assert len(pieces) == 8
    assert len(rounds(matrices, 1)) == len(matrices), "a matrix larger than a round has a round of its own"


EXPERTS = {"bias": "qkv", "n_expert": 3, "d_expert": 8, "n_shared_expert": 1, "first_dense": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp": "swiglu", "n_kv_head": 1, "attention_gate": "headwise"},
        {"head_dim": 6, "n_kv_head": 2, "attention_gate": "elementwise"},
        {"mlp": "swiglu", **EXPERTS},
    ],
)
def test_stacked_matrices_are_what_the_model_splits(options: dict[str, Any]) -> None:
    config = GPTConfig(n_layer=2, n_head=4, d_model=16, vocab_size=100, max_seq_len=8, **options)
    model = GPT(config)
    shapes = {name: p.shape for name, p in model.named_parameters() if is_muon_parameter(name)}
    for split in (False, True):
        for name, shape in shapes.items():
            found = stacked_matrices(name, shape, config, split)
            assert sum(rows for rows, _ in found) == shape[0]
            assert {columns for _, columns in found} == {shape[1]}
            stacked = "n_expert" in options and name.startswith(("blocks.1.mlp.up", "blocks.1.mlp.proj"))
            assert split or len(found) == (3 if stacked else 1)
            if split and options.get("mlp") == "swiglu" and name.endswith("up.weight"):
                assert len(found) == (6 if stacked else 2)
    attention, x = model.blocks[0].attn, torch.randn(1, 3, 16)
    torch.nn.init.zeros_(attention.qkv.bias)
    mixed = attention.qkv(x).view(1, 3, -1, config.head_width)
    rows = [
        n for n, _ in stacked_matrices("blocks.0.attn.qkv.weight", shapes["blocks.0.attn.qkv.weight"], config, True)
    ]
    weights = torch.split(attention.qkv.weight, rows)
    for heads, weight in zip(torch.split(mixed, attention.heads, dim=2), weights, strict=True):
        torch.testing.assert_close(heads.flatten(2), x @ weight.T)


def settings_of(tmp_path: Path, **optimizer: Any) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "x",
            "model": {"n_layer": 1, "n_head": 2, "d_model": 16},
            "data": {"path": str(tmp_path), "seq_len": 8},
            "train": {
                "steps": 100, "global_batch_tokens": 64, "optimizer": {"name": "muon", "lr": 1e-3, **optimizer},
                "schedule": {"name": "linear"},
            },
        }
    )  # fmt: skip


def test_groups_have_their_own_rates(tmp_path: Path) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=100, max_seq_len=8, tie_embeddings=False))
    names = {id(p): name for name, p in model.named_parameters()}
    run = settings_of(tmp_path, muon_lr=0.02, embedding_lr=0.1, scalar_lr=0.3, momentum_warmup_steps=10)
    groups = {group["name"]: group for group in optimizer_groups(model, run.train.optimizer)}
    assert set(groups) == {"embedding", "scalars", "matrices", "decay"}
    assert [names[id(p)] for p in groups["decay"]["params"]] == ["lm_head.weight"]
    assert {names[id(p)] for p in groups["embedding"]["params"]} == {"embed.weight", "pos_embed.weight"}
    assert groups["scalars"]["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    decay, rest = optimizer_groups(model, OptimizerSection())
    assert (decay["name"], decay["weight_decay"], rest["name"], rest["weight_decay"]) == ("decay", 0.1, "no_decay", 0.0)
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_a_step_sets_what_a_checkpoint_has_restored(tmp_path: Path) -> None:
    """Loading a state_dict restores the groups' settings of the save; the run file may have others since."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=16, vocab_size=100, max_seq_len=8))
    run = settings_of(tmp_path, weight_decay=0.2, betas=[0.8, 0.9], eps=1e-6, muon_lr=0.02)
    stale = {"lr": 7.0, "weight_decay": 7.0, "betas": [0.0, 0.0], "eps": 7.0, "momentum": 7.0}
    groups = [group | stale for group in optimizer_groups(model, run.train.optimizer)]
    set_rates(groups, 0, run.train)
    for group in groups:
        assert group["weight_decay"] == (0.0 if group["name"] == "no_decay" else 0.2)
        assert (group["betas"], group["eps"], group["momentum"]) == ([0.8, 0.9], 1e-6, 0.95)
        assert group["lr"] == pytest.approx(0.02 if group["name"] == MATRICES else 1e-3)


def test_momentum_and_weight_decay_follow_their_schedules(tmp_path: Path) -> None:
    optimizer = settings_of(tmp_path, momentum=0.95, momentum_warmup_steps=10).train.optimizer
    assert [momentum(step, optimizer) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum(0, settings_of(tmp_path, momentum=0.5, momentum_warmup_steps=9).train.optimizer) == 0.5
    train = settings_of(tmp_path, weight_decay=0.2, weight_decay_schedule="lr").train
    for step in (0, 50, 99):
        assert weight_decay(step, train) == pytest.approx(0.2 * learning_rate(step, train) / 1e-3)
    assert weight_decay(77, settings_of(tmp_path, weight_decay=0.2).train) == 0.2


def test_scales_are_the_published_ones() -> None:
    cases: list[tuple[int, int, Callable[[float, float], float], str]] = [
        (8, 2, lambda a, b: math.sqrt(a / b), "shape"), (2, 8, lambda a, b: 1.0, "shape"),
        (2, 8, lambda a, b: 0.2 * math.sqrt(b), "rms"),
    ]  # fmt: skip
    for rows, columns, expected, kind in cases:
        assert muon.update_scale(rows, columns, kind) == pytest.approx(expected(rows, columns))
    update = orthogonalise(torch.randn(64, 256), iteration("polar_express", 8))
    assert float(update.square().mean().sqrt()) * muon.update_scale(64, 256, "rms") == pytest.approx(0.2, rel=0.01)
