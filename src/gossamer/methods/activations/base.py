"""The protocol of activation sparsity without training: score, place, threshold, repair.

A channel j of an activation v stays for a token iff |v_j| c_j exceeds a threshold calibrated
once. A method says where (``roles``) and gives c_j (``channel_weight``); quantiles, allocation,
token positions, hooks, measuring, undo and saving are shared here. What is skipped is a column of
the weight matrix that reads the channel, so sparsity is the share of weights not read.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gossamer.core import GossamerError, Method, QuantileSketch, Site, Stat
from gossamer.methods.activations.calibration import (
    BlockError,
    active_experts,
    sketch_of,
    trial_data,
)
from gossamer.methods.activations.gated import GatedModel
from gossamer.methods.activations.gates import INPUT_ROLES, Gate, Tap, check_gate, input_taps
from gossamer.methods.activations.greedy import greedy_shares
from gossamer.models import Block, Inputs, Progress, SiteMap, Tokens, as_tokens, find_sites, stream

__all__ = ["GatedModel", "Thresholded"]

Allocation = Literal["uniform", "greedy"]


@dataclass(frozen=True, kw_only=True)
class Thresholded(Method):
    """Base of the methods that gate channels by a calibrated threshold on their score.

    Parameters
    ----------
    sparsity : share of the weights of the gated layers that a token does not read.
    allocation : ``uniform`` gives every input the same sparsity; ``greedy`` splits it inside
        every block by the error each step does to the block's output.
    dense_prefix : real tokens at the start of every text that are not masked (attention sinks).
    step : sparsity that one greedy step adds to the block's reference matrix, 0 < step <= 1.
    """

    roles: ClassVar[tuple[str, ...]] = INPUT_ROLES
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.INPUT_QUANTILES})

    sparsity: float = 0.4
    allocation: Allocation = "uniform"
    dense_prefix: int = 1
    step: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in get_args(Allocation):
            raise GossamerError(
                f"allocation is {self.allocation!r}; choose from {', '.join(get_args(Allocation))}"
            )
        if not isinstance(self.dense_prefix, int) or self.dense_prefix < 0:
            raise GossamerError(
                f"dense_prefix is {self.dense_prefix!r}; give a whole number of tokens, at least 0"
            )
        if not 0.0 < self.step <= 1.0:
            raise GossamerError(f"step is {self.step!r}; it is a share, so 0 < step <= 1")

    @abstractmethod
    def channel_weight(self, site: Site, weight: Tensor) -> Tensor | None:
        """c_j of the score |x_j| c_j at a site's input.

        Parameters
        ----------
        weight : (O, I), the site's matrix.

        Returns
        -------
        float32 (I,), at least 0, or None for 1 everywhere. Experts that share an input take the
        root mean square of theirs.
        """

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> "GatedModel":
        """Calibrate thresholds and put them to work as hooks; the weights are not touched.

        Parameters
        ----------
        model : any model whose sites are known.
        data : calibration text or tokens, see :func:`gossamer.models.as_tokens`; ``Inputs`` for
            models of other inputs. The greedy allocation tries its steps on the first 4 x 128
            tokens of it.
        """
        sites = find_sites(model)
        tokens = data if isinstance(data, Inputs) else as_tokens(data, model)
        taps = {i: self._taps(model, sites, i) for i in range(len(sites.blocks))}
        sketches: dict[str, QuantileSketch] = {}

        def collect(block: Block) -> None:
            for tap in taps[block.index]:
                sketches[tap.name] = sketch_of(model, block, tap)

        stream(
            model,
            tokens,
            self.needs,
            collect,
            sites=sites,
            batch_size=batch_size,
            recompute=False,
            progress=progress,
        )
        every = [tap for block in taps.values() for tap in block]
        shares = {tap.name: self.sparsity for tap in every}
        if self.allocation == "greedy" and self.sparsity > 0:
            shares = self._greedy(model, sites, tokens, taps, sketches, batch_size, progress)
        gates = [tap.gate(shares[tap.name], sketches[tap.name]) for tap in every]
        return GatedModel(self, model, sites, gates, self.dense_prefix)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "GatedModel":
        """Put stored thresholds to work on a loaded model.

        Raises
        ------
        GossamerError
            If the model lacks a gated layer or has it in another size.
        """
        sites = find_sites(model)
        blocks = range(len(sites.blocks))
        taps = {tap.name: tap for i in blocks for tap in self._taps(model, sites, i, bare=True)}
        gates = []
        for values in meta["gates"]:
            gate = Gate(**values, cut=tensors[f"cut.{values['name']}"].float())
            check_gate(gate, taps.get(gate.name))
            gates.append(gate)
        return GatedModel(self, model, sites, gates, self.dense_prefix)

    # -- where, and how much -----------------------------------------------------------------

    def _taps(
        self, model: nn.Module, sites: SiteMap, block: int, *, bare: bool = False
    ) -> tuple[Tap, ...]:
        """The places this method gates in a block, with their channel weights unless bare."""
        taps = input_taps(sites.in_block(block), self.roles, active_experts(model, sites))
        return taps if bare else tuple(tap.weighed(model, self.channel_weight) for tap in taps)

    def _greedy(
        self,
        model: nn.Module,
        sites: SiteMap,
        tokens: Tokens | Inputs,
        taps: Mapping[int, tuple[Tap, ...]],
        sketches: Mapping[str, QuantileSketch],
        batch_size: int,
        progress: Progress | None,
    ) -> dict[str, float]:
        """Sparsity per tap, the same weighted mean in every block."""
        shares: dict[str, float] = {}

        def split(block: Block) -> None:
            here = taps[block.index]
            with BlockError(model, block, self.dense_prefix) as measure:
                shares.update(
                    greedy_shares(
                        {tap.name: tap.size for tap in here},
                        self.sparsity,
                        lambda p: measure([t.gate(p[t.name], sketches[t.name]) for t in here]),
                        step=self.step,
                        unit=next((t.size for t in here if t.role == "attention.q"), None),
                    )
                )

        stream(
            model,
            trial_data(tokens),
            frozenset(),
            split,
            sites=sites,
            batch_size=batch_size,
            recompute=False,
            progress=progress,
        )
        return shares
