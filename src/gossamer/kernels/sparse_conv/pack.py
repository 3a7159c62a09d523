"""PackedConv: the weights of a 1x1 convolution as its kernel reads them, bias included.

Shapes: O = output channels, I = input channels, B = output channels of a block (1, 2 or 4),
G = O // B blocks and O % B single channels after them, K = stored channels of all groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError

__all__ = ["BLOCKS", "PackedConv", "best_block", "fill", "pack_conv"]

BLOCKS = (1, 2, 4)
_LEAST_FILL = {4: 3.6, 2: 1.8}  # nonzeros in a stored block from which blocks pay


@dataclass(frozen=True, eq=False)
class PackedConv:
    """A (O, I) matrix and a bias, walked in the order of reading; made by :func:`pack_conv`.

    Parameters
    ----------
    values : float32. Of every group in turn: its B biases, then, for every input channel that it
        stores, its B weights.
    steps : int32, (K,), input channels from one stored channel to the next, in every group
        counted from channel 0; times the bytes of a row of the strip they are what the kernel
        adds to its pointer.
    start : int64, (G + O % B + 1,), where each group's steps begin.
    shape : (O, I).
    block : B.
    """

    values: Tensor
    steps: Tensor
    start: Tensor
    shape: tuple[int, int]
    block: int

    @property
    def blocks(self) -> int:
        """G, the groups of B channels; single channels follow."""
        return self.shape[0] // self.block

    @property
    def kept(self) -> int:
        """Weights stored, zeros that fill up blocks included."""
        return len(self.values) - self.shape[0]

    @property
    def sparsity(self) -> float:
        """Share of the matrix that is not stored; 0 for an empty matrix."""
        total = self.shape[0] * self.shape[1]
        return 1.0 - self.kept / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes stored, which are the bytes that a strip reads beside its activations."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.steps, self.start))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values of blocks and of singles, a row a bias or channel; which rows are biases."""
        heads = self.start[:-1] + torch.arange(len(self.start) - 1, device=self.start.device)
        cut = int(self.start[self.blocks]) + self.blocks
        blocks = self.values[: cut * self.block].view(cut, self.block)
        return blocks, self.values[cut * self.block :].view(-1, 1), heads

    def _places(self) -> tuple[Tensor, Tensor]:
        """(group, input channel) of every step."""
        counts = self.start.diff()
        group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        run = self.steps.to(torch.int64).cumsum(0)
        # Each group counts from channel 0: take off what the groups before it added up to.
        total = torch.cat([run.new_zeros(1), run])
        return group, run - total[self.start[:-1]][group]

    def stored(self) -> Tensor:
        """bool, (O, I), True where a weight is stored."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        group, channel = self._places()
        rows = self.blocks * self.block
        wide = torch.zeros(self.blocks, self.shape[1], dtype=torch.bool, device=mask.device)
        inside = group < self.blocks
        wide[group[inside], channel[inside]] = True
        mask[:rows] = wide.repeat_interleave(self.block, 0)
        mask[rows + group[~inside] - self.blocks, channel[~inside]] = True
        return mask

    def to_dense(self) -> tuple[Tensor, Tensor]:
        """The (O, I) matrix, every stored weight bit for bit, and the (O,) bias."""
        blocks, singles, heads = self._parts()
        dense = torch.zeros(self.shape, device=self.values.device)
        head = torch.zeros(len(blocks) + len(singles), dtype=torch.bool, device=dense.device)
        head[heads] = True
        of_block, of_single = head[: len(blocks)], head[len(blocks) :]
        group, channel = self._places()
        inside, rows = group < self.blocks, self.blocks * self.block
        grid = dense[:rows].view(self.blocks, self.block, self.shape[1])
        grid[group[inside], :, channel[inside]] = blocks[~of_block]
        dense[rows + group[~inside] - self.blocks, channel[~inside]] = singles[~of_single, 0]
        return dense, torch.cat([blocks[of_block].reshape(-1), singles[of_single, 0]])

    def check(self) -> "PackedConv":
        """Return self, or say what contradicts what; kernels read these tensors unguarded.

        Raises
        ------
        GossamerError
            If dtypes, sizes, starts or channels do not fit together.
        """
        (rows, columns), start = self.shape, self.start
        if self.block not in BLOCKS:
            raise GossamerError(f"blocks hold 1, 2 or 4 output channels; got {self.block}")
        groups = self.blocks + rows % self.block
        fits = (
            self.values.dtype == torch.float32
            and self.steps.dtype == torch.int32
            and start.dtype == torch.int64
            and len(start) == groups + 1
            and int(start[0]) == 0
            and not bool((start.diff() < 0).any())
            and int(start[-1]) == len(self.steps)
        )
        if fits:
            in_blocks = int(start[self.blocks])
            kept = self.block * in_blocks + len(self.steps) - in_blocks
            group, channel = self._places()
            place = group * max(1, columns) + channel
            inside = bool(((channel >= 0) & (channel < columns)).all())
            fits = len(self.values) == rows + kept and inside and bool((place.diff() > 0).all())
        if not fits:
            raise GossamerError(
                f"tensors of a packed {rows}x{columns} convolution in blocks of {self.block} do "
                "not fit together; pack it again"
            )
        return self

    def __repr__(self) -> str:
        size = f"{self.shape[0]}x{self.shape[1]}"
        return (
            f"PackedConv({size}, blocks of {self.block}, sparsity {self.sparsity:.4f}, "
            f"{self.nbytes:,} bytes)"
        )


def fill(kept: Tensor, block: int) -> float:
    """Nonzeros in a non-empty block of ``block`` output channels, on average; 0 without any.

    Parameters
    ----------
    kept : bool, (O, I). The O % block last channels are left out.
    """
    groups = len(kept) // block
    grid = kept[: groups * block].view(groups, block, kept.shape[1])
    some = int(grid.any(1).sum())
    return int(grid.sum()) / some if some else 0.0


def best_block(weight: Tensor) -> int:
    """Blocks of 4 if those that are not empty hold 3.6 nonzeros, of 2 at 1.8, else none (1).

    Source: the planner's rule of the kernel's first implementation, as the method's card has it.
    """
    kept = weight.flatten(1) != 0
    return next((b for b, least in _LEAST_FILL.items() if fill(kept, b) >= least), 1)


def pack_conv(
    weight: Tensor,
    bias: Tensor | None = None,
    block: int | None = None,
) -> PackedConv:
    """Store the weights of a 1x1 convolution by its nonzeros.

    Parameters
    ----------
    weight : (O, I) or (O, I, 1, 1), real; rounded to float32.
    bias : (O,), or None for zeros.
    block : 1, 2 or 4 output channels that share the channels they store; that of
        :func:`best_block` when left out.

    Raises
    ------
    GossamerError
        For another shape, a kernel larger than 1x1, NaN or infinite weights, or another block.
    """
    if weight.dim() < 2 or weight.shape[2:].numel() != 1 or weight.is_complex():
        raise GossamerError(
            f"a sparse convolution takes weights (O, I, 1, 1); got {tuple(weight.shape)}"
        )
    dense = weight.detach().flatten(1).to(torch.float32)
    rows, columns = dense.shape
    if bias is not None and bias.shape != (rows,):
        raise GossamerError(f"{rows} output channels take as many biases; got {tuple(bias.shape)}")
    offset = dense.new_zeros(rows) if bias is None else bias.detach().to(dense)
    if bad := int((~dense.isfinite()).sum() + (~offset.isfinite()).sum()):
        raise GossamerError(f"{bad} weights are NaN or infinite; repair the layer first")
    block = best_block(dense) if block is None else block
    if block not in BLOCKS:
        raise GossamerError(f"blocks hold 1, 2 or 4 output channels; got {block}")
    cut = rows // block * block
    parts = [_group(dense[:cut], offset[:cut], block), _group(dense[cut:], offset[cut:], 1)]
    counts = torch.cat([part[2] for part in parts])
    return PackedConv(
        values=torch.cat([part[0] for part in parts]),
        steps=torch.cat([part[1] for part in parts]),
        start=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        shape=(rows, columns),
        block=block,
    )


def _group(dense: Tensor, bias: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, steps, and stored channels a group, of rows that come in whole blocks."""
    groups = len(dense) // block
    grid = dense.view(groups, block, dense.shape[1]).transpose(1, 2)
    stored = (grid != 0).any(2)
    group, channel = stored.nonzero(as_tuple=True)
    counts = stored.sum(1)
    # Row k of the values belongs to channel k of all; each group's biases come before its own.
    place = torch.arange(len(group), device=dense.device) + group + 1
    values = dense.new_zeros(len(group) + groups, block)
    values[place] = grid[group, channel]
    begin = counts.cumsum(0) - counts
    values[begin + torch.arange(groups, device=dense.device)] = bias.view(groups, block)
    steps = channel.diff(prepend=channel.new_zeros(1)) if len(channel) else channel
    steps[begin[counts > 0]] = channel[begin[counts > 0]]
    return values.view(-1), steps.to(torch.int32), counts
