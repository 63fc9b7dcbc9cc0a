"""Muon for the matrices of the blocks, Adam for the rest: one optimizer that DeepSpeed partitions as it does Adam.

    optimizer = Muon(groups, adam, settings)           # handed to deepspeed.initialize
    optimizer.locate(engine)                           # afterwards: which rank holds which part of which matrix

A step of Muon (https://kellerjordan.github.io/posts/muon) with the gradient G of a matrix W:

    B <- m B + (1 - m) G                    momentum, element by element
    U  = (1 - m) G + m B                    Nesterov; otherwise B
    O  = orthogonalise(U)                   all singular values close to 1: needs the complete matrix
    W <- W - lr decay W - lr scale O        scale: a function of the shape (update_scale)

To DeepSpeed this is an optimizer of flat fp32 partitions, as Adam is. The momentum has the size of the partition and is
stored, cut and converted like Adam's moments. DeepSpeed clips the gradient before the step, at every stage alike, so
that clipping never cuts O. Only the third line needs other ranks. Each matrix has one owner. The owner gets the parts
of U from all ranks, computes O, and sends the parts of O back: two all-to-all exchanges per ROUND elements of a rank.
With NorMuon (row_beta), the mean square of each row travels in two more exchanges.

                                  to the owner        orthogonalise        back
    rank 0, slice  A A A B B      B from rank 1       owns B: B B B        B to rank 1
    rank 1, slice  B C C C C      A A A from rank 0   owns A: A A A        A A A to rank 0

The owners are chosen so that all ranks compute about as long. Each matrix is multiplied alone and by the same kernels,
whichever rank owns it. So its update has the same bits in every layout that has the same number of threads per rank.
Products are in bf16 on GPUs and in bf16 runs, as in Muon's publications, because the iteration corrects its own
rounding; an fp32 or fp16 run on CPUs computes them in fp32. The exchanges have the dtype of the products, which changes
no bit of the result. Cost for an n x m matrix, n <= m: 4 n^2 m + 2 n^3 FLOPs per iteration; on CPUs, batched products
take as long (LOG.md). A fused matrix (queries, keys and values; gate and up; experts) is several matrices below each
other, each a range of elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import OptimizerSection
from packspeed.launch.engine.groups import MATRICES
from packspeed.launch.engine.optimizer_state import held_parts
from packspeed.launch.engine.protocol import Engine
from packspeed.model.gpt import GPT, is_muon_parameter, stacked_matrices

ROUND = 2**27  # elements of a rank that one exchange sends at most, unless a single matrix is larger
EPS = 1e-7

Coefficients = Sequence[tuple[float, float, float]]

# Of Muon's author: the steepest polynomial at 0 whose iteration stays between 0.7 and 1.2.
QUINTIC = ((3.4445, -4.7750, 2.0315),)
# Polar Express (https://arxiv.org/abs/2505.16932), optimal for singular values from 1e-3 on: one polynomial per
# iteration. The paper's safety factor of 1.01 against rounding in bf16 is applied here.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.875, -1.25, 0.375),
    )
)
POLYNOMIALS = {"quintic": QUINTIC, "polar_express": POLAR_EXPRESS}


def iteration(name: str, steps: int) -> Coefficients:
    """Return the coefficients (a, b, c) of each of `steps` Newton-Schulz iterations.

    `name` chooses the list of coefficients: "quintic" or "polar_express". If the list has fewer than `steps` entries,
    its last one is repeated.
    """
    known = POLYNOMIALS[name]
    return [known[min(step, len(known) - 1)] for step in range(steps)]


def orthogonalise(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    """Return an approximation of U V^T, if U S V^T is the singular value decomposition of `matrix` (n, m).

    Computed by Newton-Schulz iterations in the matrix's dtype. An iteration maps each singular value s to a s + b s^3 +
    c s^5. A zero matrix stays zero.
    """
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


def equalise_rows(update: Tensor, squares: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divide each row of an orthogonalised update by the running RMS of that row, then restore the update's norm.

    This is NorMuon (https://arxiv.org/abs/2510.05491): some rows of an orthogonalised update are much longer than
    others, step after step. squares (rows,) fp32: the running mean of the squares of each row, 0 before the first step.
    beta: its decay rate. Returns (the new update, the new running means).
    """
    wide = update.float()
    squares = squares.lerp(wide.square().mean(1), 1 - beta)
    equal = wide / (squares.sqrt()[:, None] + EPS)
    return (equal * (wide.norm() / equal.norm().clamp(min=EPS))).to(update.dtype), squares


def update_scale(rows: int, columns: int, kind: str) -> float:
    """Return the factor by which an orthogonalised (rows, columns) update is multiplied. `kind`: "shape" or "rms".

    shape: sqrt(max(1, rows / columns)), as Muon's author proposed. rms: 0.2 sqrt(max(rows, columns)), with which the
    elements have the root mean square 0.2 that AdamW's updates have (Moonlight, https://arxiv.org/abs/2502.16982).
    """
    return 0.2 * math.sqrt(max(rows, columns)) if kind == "rms" else math.sqrt(max(1.0, rows / columns))


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix and where its elements are.

    This rank's part begins at index `offset` of `flat`, a flattened tensor of the optimizer. held[r] says which
    elements of the flattened matrix rank r holds: (index of the first one, number of elements).
    """

    rows: int
    columns: int
    flat: Tensor
    offset: int
    held: list[tuple[int, int]]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """Number of multiplications of one iteration, up to a constant factor: only ratios of costs matter."""
        short, long = sorted((self.rows, self.columns))
        return short * short * (2 * long + short)

    def elements(self, rank: int) -> slice:
        """Return which elements of the flattened matrix `rank` holds."""
        begin, count = self.held[rank]
        return slice(begin, begin + count)

    def begun_rows(self, rank: int) -> slice:
        """Return the rows whose first element `rank` holds. Every row begins on exactly one rank."""
        begin, count = self.held[rank]
        return slice(-(-begin // self.columns), -(-(begin + count) // self.columns))

    def touched_rows(self, rank: int) -> slice:
        """Return the rows of which `rank` holds at least one element."""
        begin, count = self.held[rank]
        return slice(begin // self.columns, -(-(begin + count) // self.columns)) if count else slice(0, 0)

    def part(self, flat: Tensor, rank: int) -> Tensor:
        """Return a view of this rank's part of the matrix in `flat`, a tensor with the same layout as self.flat."""
        return flat[self.offset : self.offset + self.held[rank][1]]


Spans = Callable[[Matrix, int], slice]  # Matrix.elements and the like: which numbers of a matrix a rank has


class Round:
    """Matrices whose elements are exchanged together: all ranks send them to the owners, the ranks that orthogonalise
    them, and the owners send the results back.

    `replicated`: every rank holds every matrix completely (ZeRO-0), so nothing is sent to the owners.
    """

    def __init__(self, matrices: Sequence[Matrix], rank: int, replicated: bool, group: object) -> None:
        self.rank, self.group, self.replicated = rank, group, replicated
        self.ranks = range(len(matrices[0].held))
        self.of_owner = share_out(matrices, len(self.ranks))
        self.mine = self.of_owner[rank]

    def collect(self, part_of: Callable[[Matrix], Tensor], spans: Spans, dtype: torch.dtype) -> dict[Matrix, Tensor]:
        """Collect each matrix on its owner. Return {matrix that this rank owns: flat tensor of all its elements}.

        part_of(matrix): the elements that this rank holds, as a flat tensor. spans(matrix, rank): which elements a rank
        holds. The results are on the device. A collective.
        """

        def sent(matrix: Matrix, source: int, owner: int) -> slice:
            return spans(matrix, source) if source == owner or not self.replicated else slice(0, 0)

        arrived = self._exchange(
            [
                [part_of(matrix) for matrix in of_owner if length(sent(matrix, self.rank, owner))]
                for owner, of_owner in enumerate(self.of_owner)
            ],
            [[length(sent(matrix, source, self.rank)) for matrix in self.mine] for source in self.ranks],
            dtype,
        )
        complete = {}
        for matrix, parts in zip(self.mine, zip(*arrived, strict=True), strict=True):
            if len(self.ranks) == 1:
                complete[matrix] = parts[0]
                continue
            places = [sent(matrix, source, self.rank) for source in self.ranks]
            complete[matrix] = parts[0].new_empty(max(place.stop for place in places))
            for place, part in zip(places, parts, strict=True):
                complete[matrix][place] = part
        return complete

    def distribute(
        self, complete: dict[Matrix, Tensor], spans: Spans, dtype: torch.dtype
    ) -> Iterator[tuple[Matrix, Tensor]]:
        """Send the elements of every matrix from its owner to the ranks that hold them. Yields (matrix, flat tensor of
        this rank's elements).

        complete: {matrix that this rank owns: flat tensor of all its elements}. spans(matrix, rank): which elements a
        rank holds. A collective.
        """
        arrived = self._exchange(
            [[complete[matrix][spans(matrix, rank)] for matrix in self.mine] for rank in self.ranks],
            [[length(spans(matrix, self.rank)) for matrix in of_owner] for of_owner in self.of_owner],
            dtype,
        )
        for of_owner, parts in zip(self.of_owner, arrived, strict=True):
            yield from zip(of_owner, parts, strict=True)

    def _exchange(
        self, parts: list[list[Tensor]], received: list[list[int]], dtype: torch.dtype
    ) -> list[tuple[Tensor, ...]]:
        """Send the flat tensors in parts[r] to rank r, for every r, in this dtype. A collective.

        Returns one tuple per rank r: the tensors that rank r sent to this rank. Their sizes are the list received[r].
        """
        device = torch.device(get_accelerator().current_device_name())
        if len(self.ranks) == 1:
            return [tuple(part.to(device, dtype) for part in parts[0])]
        sizes = [sum(of_rank) for of_rank in received]
        arrived = torch.empty(sum(sizes), device=device, dtype=dtype)
        joined = torch.cat([arrived[:0], *(part.to(device, dtype) for of_rank in parts for part in of_rank)])
        sent = [sum(part.numel() for part in of_rank) for of_rank in parts]
        dist.all_to_all_single(arrived, joined, sizes, sent, group=self.group)
        pieces = torch.split(arrived, sizes)
        return [torch.split(piece, of_rank) for piece, of_rank in zip(pieces, received, strict=True)]


def length(span: slice) -> int:
    """Return the number of elements in a slice without a step."""
    return int(span.stop - span.start)


def products_dtype(bf16_run: bool) -> torch.dtype:
    """Return the dtype of Muon's matrix products: bf16 on an accelerator or in a bf16 run, else fp32."""
    return torch.bfloat16 if bf16_run or get_accelerator().device_name() != "cpu" else torch.float32


def share_out(matrices: Iterable[Matrix], ranks: int) -> list[list[Matrix]]:
    """Return the list of matrices that each rank owns, that is, orthogonalises.

    The costliest matrix is given away first, and each matrix to the rank with the least work so far.
    """
    of_owner: list[list[Matrix]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):
        owner = work.index(min(work))
        of_owner[owner].append(matrix)
        work[owner] += matrix.cost
    return of_owner


def rounds(matrices: Iterable[Matrix], elements: int) -> list[list[Matrix]]:
    """Cut the sequence of matrices into lists whose matrices have at most `elements` elements together, one list per
    exchange.

    A matrix with more elements gets a list of its own.
    """
    cut: list[list[Matrix]] = []
    room = 0
    for matrix in matrices:
        if not cut or matrix.numel > room:
            cut.append([])
            room = elements
        cut[-1].append(matrix)
        room -= matrix.numel
    return cut


class Muon(torch.optim.Optimizer):
    """Muon for the parameter group named "matrices", and Adam for the other groups.

    `groups` are torch's parameter groups, each with a "name". `adam(groups)` returns the Adam optimizer for the others.
    `settings` is the section train.optimizer of the run file; lr, weight_decay and momentum are read from the groups,
    because they may change from step to step. `products` is the dtype of the matrix products and of the exchanges
    between ranks.
    """

    def __init__(
        self,
        groups: list[JsonObject],
        adam: Callable[[list[JsonObject]], torch.optim.Optimizer],
        settings: OptimizerSection,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.products = products
        self.adam = adam([group for group in groups if group["name"] != MATRICES])
        self.settings = settings
        self.coefficients = iteration(settings.ns_coefficients, settings.ns_steps)
        self.rounds: dict[Tensor, list[Round]] = {}  # by the first tensor of a group that DeepSpeed updates at once
        super().__init__(groups, {"lr": settings.lr, "momentum": settings.momentum})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update all groups that have parameters. A collective of the data-parallel ranks."""
        groups = [group for group in self.param_groups if group["params"]]
        if others := [group for group in groups if group["name"] != MATRICES]:
            self.adam.param_groups, self.adam.state = others, self.state
            self.adam.step()
        for group in groups:
            if group["name"] == MATRICES:
                self._update_matrices(group)

    def _update_matrices(self, group: JsonObject) -> None:
        """Update the matrices of one parameter group with Muon. A collective of the data-parallel ranks."""
        updates: dict[Tensor, Tensor] = {}
        for parameter in group["params"]:
            momentum = self._state_of(parameter, "momentum_buffer").lerp_(parameter.grad, 1 - group["momentum"])
            nesterov = self.settings.nesterov
            update = parameter.grad.lerp_(momentum, group["momentum"]) if nesterov else momentum
            updates[parameter] = update.view(-1)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for part in self.rounds[group["params"][0]]:
            for matrix, direction in self._directions(part, updates):
                target = matrix.part(matrix.flat.data.view(-1), part.rank)
                scale = update_scale(matrix.rows, matrix.columns, self.settings.update_scale)
                target.add_(direction.to(target.device, target.dtype), alpha=-group["lr"] * scale)

    def _directions(self, part: Round, updates: dict[Tensor, Tensor]) -> Iterator[tuple[Matrix, Tensor]]:
        """Yield (matrix, flat tensor of this rank's elements of the orthogonalised update). Update NorMuon's means.

        updates: {flattened tensor of the optimizer: the updates before they are orthogonalised}. A collective.
        """
        rank, dtype, beta = part.rank, self.products, self.settings.row_beta
        complete = part.collect(lambda matrix: matrix.part(updates[matrix.flat], rank), Matrix.elements, dtype)
        squares: dict[Matrix, Tensor] = {}
        if beta is not None:
            squares = part.collect(lambda matrix: self._row_squares(matrix, rank), Matrix.begun_rows, torch.float32)
        for matrix, flat in complete.items():
            direction = orthogonalise(flat.view(matrix.rows, matrix.columns), self.coefficients)
            if beta is not None:
                direction, squares[matrix] = equalise_rows(direction, squares[matrix], beta)
            complete[matrix] = direction.reshape(-1)
        yield from part.distribute(complete, Matrix.elements, dtype)
        if beta is not None:
            for matrix, rows in part.distribute(squares, Matrix.touched_rows, torch.float32):
                own = matrix.part(self._state_of(matrix.flat, "row_square").view(-1), rank)
                before = matrix.held[rank][0] % matrix.columns
                own.copy_(rows.to(own.device).repeat_interleave(matrix.columns)[before : before + own.numel()])

    def _row_squares(self, matrix: Matrix, rank: int) -> Tensor:
        """Return NorMuon's running mean squares of the rows that begin on this rank (`rank`), one number per row.

        The optimizer state repeats this number for each element of the row. So it has the shape of the momentum, and a
        checkpoint treats both alike.
        """
        own = matrix.part(self._state_of(matrix.flat, "row_square").view(-1), rank)
        return own[-matrix.held[rank][0] % matrix.columns :: matrix.columns]

    def _state_of(self, parameter: Tensor, name: str) -> Tensor:
        """Return the state `name` of a parameter, a tensor of the parameter's shape. At first it is zero."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        tensor: Tensor = state[name]
        return tensor

    def locate(self, engine: Engine) -> None:
        """Find out which rank holds which part of which matrix. Call it once. A collective: every rank must call it."""
        stage, group = engine.zero_optimization_stage(), engine.seq_data_parallel_group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        held = {part.name: part for part in held_parts(engine)}
        names = [name for name, _ in engine.module.named_parameters() if is_muon_parameter(name)]
        own = [(held[name].begin, held[name].count) if name in held else (0, 0) for name in names]
        of_ranks = gather_numbers(own, ranks, group)
        # What DeepSpeed updates at once: all matrices, but a sub-group of them at stage 3.
        group_of_all = next(group for group in self.param_groups if group["name"] == MATRICES)
        first = group_of_all["params"][0] if stage < 3 else None
        found: dict[Tensor, list[Matrix]] = {}
        model = engine.module
        assert isinstance(model, GPT)
        for number, name in enumerate(names):
            parameter = model.get_parameter(name)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            key = held[name].flat if first is None else first
            flat = held[name].flat if name in held else key
            start = 0
            for rows, columns in stacked_matrices(name, shape, model.config, self.settings.split_fused):
                spans = [overlap(of_rank[number], start, rows * columns) for of_rank in of_ranks]
                offset = 0
                if name in held:
                    offset = held[name].offset + start + spans[rank][0] - held[name].begin
                found.setdefault(key, []).append(Matrix(rows, columns, flat, offset, spans))
                start += rows * columns
        self.rounds = {
            key: [Round(part, rank, stage == 0, group) for part in rounds(matrices, ROUND * ranks)]
            for key, matrices in found.items()
        }


def overlap(held: tuple[int, int], start: int, count: int) -> tuple[int, int]:
    """Return which elements of a matrix a rank holds: (index of the first in the matrix, number of elements).

    The matrix is elements [start, start + count) of a parameter. `held` is (index of the first element, number of
    elements) of the part of that parameter that the rank holds. Returns (0, 0) if it holds nothing of the matrix.
    """
    begin, end = max(held[0], start), min(held[0] + held[1], start + count)
    return (begin - start, end - begin) if begin < end else (0, 0)


def gather_numbers(own: list[tuple[int, int]], ranks: int, group: object) -> list[list[tuple[int, int]]]:
    """Return the lists `own` of all `ranks` ranks of the group. All ranks must pass the same number of pairs. A
    collective.
    """
    if ranks == 1:
        return [own]
    numbers = torch.tensor(own, device=get_accelerator().current_device_name()).view(-1)
    gathered = numbers.new_empty(ranks * numbers.numel())
    dist.all_gather_into_tensor(gathered, numbers, group=group)
    return [[(begin, count) for begin, count in of_rank] for of_rank in gathered.view(ranks, -1, 2).tolist()]
