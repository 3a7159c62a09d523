"""The protocol of activation sparsity without training: score, place, threshold, repair.

A channel j of an activation v stays for a token iff |v_j| c_j exceeds a threshold. A method says
where (``roles``: inputs of linear layers, or the activated gates of MLPs), gives c_j
(``channel_weight``, ``up_weighted``), and how the threshold comes about: a quantile calibrated
once, or a count per token. Allocation, token positions, hooks, measuring, undo and saving are
shared here. What is skipped is a column of the weight matrix that reads the channel, so sparsity
is the share of weights not read.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from gossamer.core import GossamerError, Method, QuantileSketch, Site, Stat
from gossamer.methods.activations.across import across, grid_of
from gossamer.methods.activations.calibration import (
    BlockError,
    OutputError,
    active_experts,
    sketches_of,
    strangeness,
    trial_data,
    up_rms,
)
from gossamer.methods.activations.fingerprint import check_fingerprint
from gossamer.methods.activations.gated import Beneath, GatedModel
from gossamer.methods.activations.gates import (
    INPUT_ROLES,
    Gate,
    LowRank,
    Tap,
    check_gate,
    input_taps,
)
from gossamer.methods.activations.greedy import greedy_shares
from gossamer.methods.activations.neurons import NEURONS, neuron_taps
from gossamer.models import Block, Inputs, Progress, SiteMap, Tokens, as_tokens, find_sites, stream

__all__ = ["Gated", "GatedModel", "Thresholded"]

Protocol = Literal["project", "paper"]
Allocation = Literal["uniform", "greedy", "global"]
Policy = Literal["quantile", "topk"]


@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Base of the methods that put gates at places of a model found by role.

    Parameters
    ----------
    dense_prefix : real tokens at the start of every text that are not masked (attention sinks).
    protocol : ``project`` masks every token behind the prefix; ``paper`` masks the tokens that
        the method's paper masks, whatever ``dense_prefix`` says.
    """

    roles: ClassVar[tuple[str, ...]] = INPUT_ROLES
    paper_dense: ClassVar[float | None] = None
    """Share of a text's tokens that the paper leaves dense, or None without such a paper."""

    dense_prefix: int = 1
    protocol: Protocol = "project"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("protocol", Protocol)
        if not isinstance(self.dense_prefix, int) or self.dense_prefix < 0:
            raise GossamerError(
                f"dense_prefix is {self.dense_prefix!r}; give a whole number of tokens, at least 0"
            )
        if self.protocol == "paper" and self.paper_dense is None:
            raise GossamerError(
                f"{self.key()} has no masking protocol of a paper; use protocol='project'"
            )

    def _check_choice(self, name: str, kind: Any) -> None:
        if (value := getattr(self, name)) not in get_args(kind):
            raise GossamerError(f"{name} is {value!r}; choose from {', '.join(get_args(kind))}")

    @property
    def dense(self) -> tuple[int, float]:
        """Tokens and share of tokens at the start of every text that are not masked."""
        if self.protocol == "paper" and self.paper_dense is not None:
            return 0, self.paper_dense
        return self.dense_prefix, 0.0

    @abstractmethod
    def _plan(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        batch_size: int,
        progress: Progress | None,
    ) -> list[Gate]:
        """The gates, from calibration data."""

    def _facts(self, gates: list[Gate]) -> tuple[str, ...]:
        """What the report should say of the gates found, in sentences."""
        return ()

    def _beneath(self, model: nn.Module, sites: SiteMap) -> Beneath | None:
        """Change the model itself before calibration, or leave it."""
        return None

    def _beneath_again(
        self, model: nn.Module, sites: SiteMap, tensors: Mapping[str, Tensor]
    ) -> Beneath | None:
        """Change a loaded model as :meth:`_beneath` did, from what was stored."""
        return None

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> GatedModel:
        """Calibrate thresholds and put them to work as hooks.

        Parameters
        ----------
        model : any model whose sites are known.
        data : calibration text or tokens, see :func:`gossamer.models.as_tokens`; ``Inputs`` for
            models of other inputs. Allocations by error try their steps on the first 4 x 128
            tokens of it.
        """
        sites = find_sites(model)
        tokens = data if isinstance(data, Inputs) else as_tokens(data, model)
        strange = strangeness(model, sites, trial_data(tokens))
        beneath = self._beneath(model, sites)
        try:
            gates = self._plan(model, sites, tokens, batch_size, progress)
            warnings = () if strange is None else (strange,)
            facts = self._facts(gates)
            if isinstance(tokens, Tokens) and self.dense[0] >= tokens.length:
                facts += (f"no token is masked in texts of {tokens.length} tokens or fewer",)
            said = {"warnings": warnings, "facts": facts}
            return GatedModel(self, model, sites, gates, *self.dense, beneath=beneath, **said)
        except BaseException:
            if beneath is not None:
                beneath.undo()
            raise

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> GatedModel:
        """Put stored thresholds to work on a loaded model.

        Raises
        ------
        GossamerError
            If the model lacks a gated layer, has it in another size, or has other weights.
        """
        sites = find_sites(model)
        check_fingerprint(meta.get("model"), model, sites)
        blocks = range(len(sites.blocks))
        taps = {tap.name: tap for i in blocks for tap in self._places(model, sites, i)}
        gates = []
        for values in meta["gates"]:
            name = values["name"]
            low_rank = None
            if f"left.{name}" in tensors:
                low_rank = LowRank(tensors[f"left.{name}"], tensors[f"right.{name}"])
            gate = Gate(**values, cut=tensors[f"cut.{name}"].float(), low_rank=low_rank)
            check_gate(gate, taps.get(name))
            gates.append(gate)
        beneath = self._beneath_again(model, sites, tensors)
        said = {name: tuple(meta.get(name, ())) for name in ("warnings", "facts")}
        return GatedModel(self, model, sites, gates, *self.dense, beneath=beneath, **said)

    def _places(self, model: nn.Module, sites: SiteMap, block: int) -> tuple[Tap, ...]:
        """The places this method gates in a block, in the order of the sites."""
        active, inside = active_experts(model, sites), sites.in_block(block)
        taps = input_taps(inside, self.roles, active)
        return (*taps, *neuron_taps(model, inside, active)) if NEURONS in self.roles else taps


@dataclass(frozen=True, kw_only=True)
class Thresholded(Gated):
    """Base of the methods that gate channels at a sparsity asked for.

    Parameters
    ----------
    sparsity : share of the weights of the gated layers that a token does not read.
    allocation : ``uniform`` gives every place the same sparsity; ``greedy`` splits it inside
        every block by the error each step does to the block's output; ``global`` first splits it
        over the blocks by what each alone does to the model's predictions, then greedily.
    step : sparsity that one greedy step adds to the block's reference matrix, 0 < step <= 1.
    policy : ``quantile`` compares with a threshold calibrated once; ``topk`` keeps the same
        number of channels for every token.
    """

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.INPUT_QUANTILES})
    up_weighted: ClassVar[bool] = False
    """Whether c_j of neurons has the factor rms(u_j), measured on the calibration data."""

    sizes_too: ClassVar[bool] = False
    """Whether quantiles of |v| are needed beside those of a weighted score."""

    sparsity: float = 0.4
    allocation: Allocation = "uniform"
    step: float = 0.05
    policy: Policy = "quantile"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("allocation", Allocation)
        self._check_choice("policy", Policy)
        if not 0.0 < self.step <= 1.0:
            raise GossamerError(f"step is {self.step!r}; it is a share, so 0 < step <= 1")

    @abstractmethod
    def channel_weight(self, site: Site, weight: Tensor) -> Tensor | None:
        """c_j of the score |v_j| c_j, as far as it follows from the weights.

        Parameters
        ----------
        site : the matrix that reads the channels; of neurons, the down projection.
        weight : (O, I), the site's matrix.

        Returns
        -------
        float32 (I,), at least 0, or None for 1 everywhere. Experts that share an input take the
        root mean square of theirs.
        """

    def _taps(self, model: nn.Module, sites: SiteMap, block: int) -> tuple[Tap, ...]:
        """The places of a block with their channel weights, as far as the weights give them."""
        places = self._places(model, sites, block)
        return tuple(tap.weighed(model, self.channel_weight) for tap in places)

    def _sketches(
        self, model: nn.Module, block: Block, taps: tuple[Tap, ...]
    ) -> dict[str, QuantileSketch]:
        """What :meth:`_gate` will look quantiles up in, a tap's own under its name."""
        return {} if self.policy == "topk" else sketches_of(model, block, taps)

    def _gate(self, tap: Tap, share: float, sketches: Mapping[str, QuantileSketch]) -> Gate:
        """The gate of a place at a sparsity."""
        if self.policy == "topk":
            return tap.gate_keeping(share)
        return tap.gate(share, sketches[tap.name])

    def _gates(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        taps: list[Tap],
        shares: Mapping[str, float],
        sketches: Mapping[str, QuantileSketch],
    ) -> list[Gate]:
        """The gates of all places at their sparsities."""
        return [self._gate(tap, shares[tap.name], sketches) for tap in taps]

    def _plan(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        batch_size: int,
        progress: Progress | None,
    ) -> list[Gate]:
        taps = {i: self._taps(model, sites, i) for i in range(len(sites.blocks))}
        sketches: dict[str, QuantileSketch] = {}

        def collect(block: Block) -> None:
            here = taps[block.index]
            if self.up_weighted:
                taps[block.index] = here = tuple(self._with_rms(model, block, t) for t in here)
            sketches.update(self._sketches(model, block, here))

        plain = self.sizes_too or any(
            t.weight is None and not t.ups for here in taps.values() for t in here
        )
        stream(
            model,
            data,
            self.needs if plain and self.policy == "quantile" else frozenset(),
            collect,
            sites=sites,
            batch_size=batch_size,
            recompute=False,
            progress=progress,
        )
        every = [tap for block in taps.values() for tap in block]
        shares = {tap.name: self.sparsity for tap in every}
        if self.sparsity > 0 and self.allocation != "uniform":
            targets = dict.fromkeys(taps, self.sparsity)
            if self.allocation == "global":
                targets = self._across(model, sites, data, taps, sketches)
            args = (model, sites, data, taps, sketches, targets, batch_size, progress)
            shares = self._greedy(*args)
            if self.allocation == "global":
                shares = self._better(model, sites, data, every, sketches, shares)
        return self._gates(model, sites, data, every, shares, sketches)

    def _with_rms(self, model: nn.Module, block: Block, tap: Tap) -> Tap:
        rms = up_rms(model, block, tap)
        if rms is None:
            return tap
        return replace(tap, weight=rms if tap.weight is None else tap.weight.to(rms) * rms)

    # -- how much where ----------------------------------------------------------------------

    def _across(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        taps: Mapping[int, tuple[Tap, ...]],
        sketches: Mapping[str, QuantileSketch],
    ) -> dict[int, float]:
        """Sparsity per block, from the error each block alone does to the predictions."""
        error = OutputError(model, sites, trial_data(data), *self.dense)
        curves = {
            index: [
                (share, error([self._gate(tap, share, sketches) for tap in here]))
                for share in grid_of(self.sparsity)
            ]
            for index, here in taps.items()
        }
        sizes = {index: float(sum(tap.size for tap in here)) for index, here in taps.items()}
        return across(curves, sizes, self.sparsity)

    def _better(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        taps: list[Tap],
        sketches: Mapping[str, QuantileSketch],
        shares: dict[str, float],
    ) -> dict[str, float]:
        """The shares, or the uniform ones where these happen to do less harm."""
        error = OutputError(model, sites, trial_data(data), *self.dense)
        even = dict.fromkeys(shares, self.sparsity)
        ours, theirs = (
            error([self._gate(tap, choice[tap.name], sketches) for tap in taps])
            for choice in (shares, even)
        )
        return shares if ours <= theirs else even

    def _greedy(
        self,
        model: nn.Module,
        sites: SiteMap,
        data: Tokens | Inputs,
        taps: Mapping[int, tuple[Tap, ...]],
        sketches: Mapping[str, QuantileSketch],
        targets: Mapping[int, float],
        batch_size: int,
        progress: Progress | None,
    ) -> dict[str, float]:
        """Sparsity per tap, whose weighted mean in every block is the block's target."""
        shares: dict[str, float] = {}

        def split(block: Block) -> None:
            here = taps[block.index]
            with BlockError(model, block, *self.dense) as measure:
                shares.update(
                    greedy_shares(
                        {tap.name: tap.size for tap in here},
                        targets[block.index],
                        lambda p: measure([self._gate(t, p[t.name], sketches) for t in here]),
                        step=self.step,
                        unit=next((t.size for t in here if t.role == "attention.q"), None),
                    )
                )

        stream(
            model,
            trial_data(data),
            frozenset(),
            split,
            sites=sites,
            batch_size=batch_size,
            recompute=False,
            progress=progress,
        )
        return shares
