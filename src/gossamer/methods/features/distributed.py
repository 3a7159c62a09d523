"""Distributed: one dictionary trained by several processes, by rows or by latents.

``DataParallel``: every process holds the whole dictionary and trains on rows of its own; gradients
are averaged. ``LatentSharded``: every process holds a share of the latents and sees all rows; the
latents of all shares compete for the k places of a row, and reconstructions are summed. Both run
over an initialised ``torch.distributed`` group, NCCL or gloo.
Shapes: R = rows, D = input width, M = latents, W = processes, K = entries of a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.kernels.sparse_code import decode, encode_at, top_rows
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import Terms, objective
from gossamer.methods.features.rules import Codes, Rule, TopK

__all__ = ["DataParallel", "LatentSharded", "Parallel", "agree", "own_file", "share_of"]


class Parallel(Protocol):
    """What a trainer asks of the processes beside it."""

    def rows(self, rows: Tensor) -> Tensor:
        """The rows this process trains on, given its own."""
        ...

    def local(self, whole: Dictionary) -> Dictionary:
        """The part of a fresh dictionary that this process holds."""
        ...

    def whole(self, local: Dictionary) -> Dictionary:
        """The dictionary that the parts make up."""
        ...

    def objective(self, made: Dictionary, rows: Tensor, **options: Any) -> Terms:
        """The loss of this process's part."""
        ...

    def fired(self, marks: Tensor, rows: int) -> tuple[Tensor, int]:
        """Latents that fired in any process's rows, and how many rows there were."""
        ...

    def reduce(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make the gradients those of the whole batch."""
        ...

    def track(self, rule: Rule) -> None:
        """Make what a rule tracks while training that of the whole batch."""
        ...

    def total(self, squares: Mapping[str, Tensor]) -> Tensor:
        """Squared norm of the whole gradient, given those of this process's parts."""
        ...


def _started() -> tuple[int, int]:
    """Rank and number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise GossamerError(
            "no group of processes is initialised; call torch.distributed.init_process_group"
        )
    return dist.get_rank(), dist.get_world_size()


def share_of(items: int) -> slice:
    """The items, of so many, that this process reads: every W-th, from its rank on."""
    rank, world = _started()
    return slice(rank, items, world)


def own_file(path: str | Path) -> Path:
    """A process's own checkpoint: the name with its rank behind."""
    return Path(f"{path}.{_started()[0]}")


def agree(done: int, path: Path) -> None:
    """Refuse to go on where processes were stopped at different steps."""
    steps = torch.tensor([done, -done])
    dist.all_reduce(steps, dist.ReduceOp.MAX)
    if int(steps[0]) != -int(steps[1]):
        raise GossamerError(
            f"the processes' checkpoints beside {path} are of steps {-int(steps[1])} to "
            f"{int(steps[0])}, saved as one was killed; remove them all to start anew"
        )


class DataParallel:
    """The whole dictionary everywhere, each process on rows of its own.

    A process normalises the loss by the variance of its own rows, and gradients are averaged:
    the update is that of micro-batches, not of one batch of all rows. What a rule tracks while
    training (``running_`` buffers: thresholds, densities) is averaged after every step, counts
    are the largest, so that the rules of all processes stay one rule. In feature choice a process
    without a token for a latent counts with that latent's last threshold.
    """

    def __init__(self) -> None:
        self.rank, self.world = _started()

    def rows(self, rows: Tensor) -> Tensor:
        return rows

    def local(self, whole: Dictionary) -> Dictionary:
        """Everybody starts from what the first process drew."""
        for tensor in whole.state_dict().values():
            dist.broadcast(tensor, 0)
        return whole

    def whole(self, local: Dictionary) -> Dictionary:
        return local

    def objective(self, made: Dictionary, rows: Tensor, **options: Any) -> Terms:
        return objective(made, rows, **options)

    def fired(self, marks: Tensor, rows: int) -> tuple[Tensor, int]:
        found = marks.to(torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        count = torch.tensor([rows], device=marks.device)
        dist.all_reduce(count)
        return found.bool(), int(count)

    def reduce(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grad = _memory(parameter.grad)
            dist.all_reduce(grad)
            grad.div_(self.world)

    def track(self, rule: Rule) -> None:
        for name, figure in rule.named_buffers():
            if not name.rpartition(".")[2].startswith("running_"):
                continue
            if figure.is_floating_point():
                dist.all_reduce(figure)
                figure.div_(self.world)
            else:
                dist.all_reduce(figure, dist.ReduceOp.MAX)

    def total(self, squares: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(squares.values())).sum()


class LatentSharded:
    """A share of the latents in each process, all rows in every one: for TopK.

    Each process proposes its k best latents of a row; the k best of all proposals stay, ties to
    the lower latent, as in one process. The bias ``b_dec`` is held by all.
    """

    def __init__(self) -> None:
        self.rank, self.world = _started()

    def rows(self, rows: Tensor) -> Tensor:
        """The first process's rows, for all."""
        same = rows.contiguous().clone()
        dist.broadcast(same, 0)
        return same

    def local(self, whole: Dictionary) -> Dictionary:
        """Raises GossamerError for rules other than TopK, or latents that do not divide evenly."""
        if type(whole.rule) is not TopK or whole.transcoder:
            raise GossamerError(
                f"latents are shared out for TopK autoencoders, not for {type(whole.rule).__name__}"
                f"{' transcoders' if whole.transcoder else ''}; train data-parallel"
            )
        if whole.d_sae % self.world or whole.d_sae // self.world < whole.rule.k:
            raise GossamerError(
                f"{whole.d_sae} latents do not give {self.world} processes equal shares of at "
                f"least k = {whole.rule.k}; use another width"
            )
        share = whole.d_sae // self.world
        part = slice(self.rank * share, (self.rank + 1) * share)
        made = Dictionary(whole.d_in, share, whole.rule)
        with torch.no_grad():
            made.W_enc.copy_(whole.W_enc[:, part])
            made.W_dec.copy_(whole.W_dec[part])
            made.b_enc.copy_(whole.b_enc[part])
            made.b_dec.copy_(whole.b_dec)
        return made.to(whole.W_dec.device)

    @torch.no_grad()
    def whole(self, local: Dictionary) -> Dictionary:
        made = Dictionary(local.d_in, local.d_sae * self.world, local.rule)
        made.to(local.W_dec.device, local.W_dec.dtype)
        made.W_enc.copy_(_gathered(local.W_enc.T).T)
        made.W_dec.copy_(_gathered(local.W_dec))
        made.b_enc.copy_(_gathered(local.b_enc))
        made.b_dec.copy_(local.b_dec)
        made.metadata = dict(local.metadata)
        return made

    def objective(
        self,
        made: Dictionary,
        rows: Tensor,
        *,
        aux_k: int,
        aux_coefficient: float,
        dead: Tensor,
        target: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Terms:
        """As :func:`objective` of the whole dictionary; every process finds the same loss."""
        assert target is None
        assert isinstance(made.rule, TopK)
        offset = _Shared.apply(made.b_dec)
        with torch.no_grad():
            read = (rows - made.b_dec).to(made.W_enc.dtype)
            pre = torch.addmm(made.b_enc.to(read.dtype), read, made.W_enc)

        def kept(at: Tensor) -> Codes:
            values = encode_at(read, made.W_enc, made.b_enc, pre, at, offset).relu()
            return Codes(values, at.masked_fill(values.detach() <= 0, -1))

        def summed(codes: Codes) -> Tensor:
            made_here = decode(codes.values.to(made.W_dec.dtype), codes.indices, made.W_dec)
            return _Summed.apply(made_here)  # pyright: ignore[reportReturnType]

        codes = kept(self._compete(pre, None, made.rule.k))
        error = rows - summed(codes) - made.b_dec
        spread = (rows - rows.mean(0)).square().sum().clamp_min(1e-12)
        squared = error.square().sum()
        loss = squared / spread
        count = torch.tensor([len(dead)], device=rows.device)
        dist.all_reduce(count)
        keep = min(aux_k, int(count))
        if keep and aux_coefficient:
            wanted = error.detach()
            miss = (wanted - summed(kept(self._compete(pre, dead, keep)))).square().sum()
            share = miss / (wanted - wanted.mean(0)).square().sum()
            loss = loss + aux_coefficient * share.nan_to_num(0.0, 0.0, 0.0)
        return Terms(loss, squared.detach() / spread, codes)

    @torch.no_grad()
    def _compete(self, pre: Tensor, pool: Tensor | None, keep: int) -> Tensor:
        """This process's latents among the ``keep`` best of a row of all; -1 elsewhere.

        Parameters
        ----------
        pool : latents of this process that may take part; None: all.
        """
        score = pre if pool is None else pre[:, pool]
        most = min(keep, score.shape[1])
        if most:
            # Rising columns: ties between proposals then go to the lower latent.
            at = top_rows(score, most).sort(1).values
            offered = score.gather(1, at)
            at = at if pool is None else pool[at]
        else:
            at = torch.empty(len(pre), 0, dtype=torch.int64, device=pre.device)
            offered = pre.new_empty(len(pre), 0)
        missing = keep - most
        low = torch.finfo(pre.dtype).min
        offered = nn.functional.pad(offered, (0, missing), value=low)
        at = nn.functional.pad(at, (0, missing), value=-1)
        everyone = [torch.empty_like(offered) for _ in range(self.world)]
        dist.all_gather(everyone, offered.contiguous())
        best = top_rows(torch.cat(everyone, 1), keep)
        first = self.rank * keep
        own = torch.zeros(len(pre), keep * self.world, dtype=torch.bool, device=pre.device)
        mine = own.scatter_(1, best, True)[:, first : first + keep]
        return at.where(mine, -1)

    def fired(self, marks: Tensor, rows: int) -> tuple[Tensor, int]:
        return marks, rows

    def reduce(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Shares are each process's own; the bias's gradient is already that of all."""

    def track(self, rule: Rule) -> None:
        """TopK tracks nothing."""

    def total(self, squares: Mapping[str, Tensor]) -> Tensor:
        shared = torch.stack([v for name, v in squares.items() if name != "b_dec"]).sum()
        dist.all_reduce(shared)
        return shared + squares["b_dec"]


class _Summed(torch.autograd.Function):
    """The sum over processes; its gradient, equal in all, goes to each term as it is."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Shared(torch.autograd.Function):
    """A value that all processes hold, used by each for its own share: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _memory(tensor: Tensor) -> Tensor:
    """The same numbers in the order they lie in memory."""
    return tensor if tensor.is_contiguous() else tensor.T


def _gathered(part: Tensor) -> Tensor:
    """All processes' parts, one after another."""
    world = dist.get_world_size()
    found = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(found, part.contiguous())
    return torch.cat(found)
