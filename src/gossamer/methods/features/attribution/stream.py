"""Through the stream: what a source token gave, split over latents of the residual stream.

Attention and the size of the norm are held as they were; the block's input is then read linearly,
and may be replaced by its dictionary's atoms, bias and error.
Shapes: H = heads, E = width of a head, D = hidden width, K = latents of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.features.attribution.direct import check_sum
from gossamer.methods.features.attribution.view import AttentionView, tolerance
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.hooks import find_module, record
from gossamer.models import find_sites

__all__ = ["FrozenNorm", "StreamAttribution", "components", "split_source"]


@dataclass(frozen=True)
class FrozenNorm:
    """A norm at one token, with the size it divides by held: x to (x - mean) gain + bias.

    Parameters
    ----------
    gain, bias : float64 (D,). centred : whether the mean over channels is subtracted.
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    @classmethod
    @torch.no_grad()
    def at(cls, norm: nn.Module | None, x: Tensor, y: Tensor) -> "FrozenNorm":
        """The norm where it made y (D,) of x (D,); its gain and bias are found by asking it.

        Raises
        ------
        GossamerError
            If the module is neither a layer norm nor a root-mean-square norm.
        """
        x, y = x.double(), y.double()
        if norm is None:
            return cls(torch.ones_like(x), torch.zeros_like(x), False)
        # Alternating signs have mean 0, so that both kinds of norm answer alike.
        probe = torch.ones_like(x)
        probe[1::2] = -1
        if len(x) % 2:
            probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
        dtype = next(norm.parameters()).dtype
        plus, minus, flat = (
            norm(p.to(dtype)[None])[0].double() for p in (probe, -probe, torch.ones_like(x))
        )
        bias, gain = (plus + minus) / 2, (plus - minus) / 2 / probe
        centred = float((flat - bias).norm()) < 1e-3 * float(gain.norm())
        inner = (x - x.mean() if centred else x) * gain
        made = cls(gain * ((y - bias) @ inner / (inner @ inner).clamp_min(1e-300)), bias, centred)
        if float((made(x) - y).norm()) > 10 * tolerance(dtype) * float(y.norm()):
            raise GossamerError(
                f"{type(norm).__name__} is no layer norm or root-mean-square norm; attribution "
                "cannot hold its size"
            )
        return made

    def linear(self, x: Tensor) -> Tensor:
        """The norm of (..., D) without its bias."""
        x = x.double()
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.linear(x) + self.bias


@dataclass(frozen=True)
class StreamAttribution:
    """What a source gave to a reading, by latents of the stream at that source.

    Parameters
    ----------
    latents : int64 (K,), those active there. parts : float64 (K,), what each gives.
    atoms_bias : what the dictionary's bias gives. error : what it misses gives.
    biases : what the norm's and the value projection's biases give. total : the sum.
    """

    latents: Tensor
    parts: Tensor
    atoms_bias: float
    error: float
    biases: float
    total: float


@torch.no_grad()
def split_source(
    model: nn.Module,
    view: AttentionView,
    reading: Tensor,
    made: Dictionary,
    *,
    row: int,
    at: int,
    source: int,
) -> StreamAttribution:
    """Split what one source gives to a reading over a dictionary of the block's input.

    Parameters
    ----------
    reading : (H, E), how the heads' outputs are read at destination ``at``.
    made : dictionary of the stream that enters the block.

    Raises
    ------
    GossamerError
        If the dictionary has another width, or the split does not sum to what the source gave.
    """
    x, y = view.stream[row, source], view.read[row, source]
    if made.d_in != len(x) or made.transcoder:
        raise GossamerError(
            f"the stream has {len(x)} channels, the dictionary reads {made.d_in}; give an "
            f"autoencoder fitted on what enters block {view.block}"
        )
    norm = FrozenNorm.at(None if view.norm is None else find_module(model, view.norm), x, y)
    taken = view.maps[row, :, at, source].double()
    by_group = (reading.double() * taken[:, None]).unflatten(0, (-1, view.group)).sum(1)
    wanted = (by_group * view.values[row, :, source].double()).sum()
    # How the sum over heads reads the normed stream.
    read = torch.einsum("ge,ged->d", by_group, view.weight.double())
    biases = (by_group * view.bias.double()).sum() + norm.bias @ read
    codes = made.codes(x[None].to(made.W_dec.dtype))
    on = (codes.indices[0] >= 0) & (codes.values[0] != 0)
    latents, values = codes.indices[0][on], codes.values[0][on].double()
    atoms = made.W_dec[latents].double()
    missed = x.double() - values @ atoms - made.b_dec.double()
    parts = values * (norm.linear(atoms) @ read)
    rest = [norm.linear(made.b_dec) @ read, norm.linear(missed) @ read, biases]
    whole = torch.cat([parts, torch.stack(rest)])
    check_sum(whole[None], wanted[None], "a source's share", view.values.dtype)
    offset, error, constant = (float(part) for part in rest)
    return StreamAttribution(latents, parts, offset, error, constant, float(wanted))


@torch.no_grad()
def components(model: nn.Module, inputs: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """What the stream that enters a block is the sum of: name to (B, T, D).

    ``embedding``, then ``attention l`` and ``mlp l`` of every earlier block; the sum is checked.

    Raises
    ------
    GossamerError
        If other things are added to the stream, as norms behind attention or mixed experts.
    """
    found = find_sites(model)
    paths = {"embedding": f"{found.blocks[0]}:in", "stream": f"{found.blocks[block]}:in"}
    for earlier in range(block):
        for name, role in (("attention", "attention.o"), ("mlp", "mlp.down")):
            for site in found.select(role, (earlier,)):
                paths[f"{name} {earlier}"] = site.module
    seen = record(model, tuple(dict.fromkeys(paths.values())), inputs)
    parts = {name: seen[path] for name, path in paths.items()}
    stream = parts.pop("stream")
    missing = float((sum(parts.values()) - stream).norm())
    if missing > tolerance(stream.dtype) * float(stream.norm()):
        raise GossamerError(
            f"attention and MLPs do not sum to what enters block {block} of "
            f"{type(model).__name__}; trace supports plain residual streams only"
        )
    return parts
