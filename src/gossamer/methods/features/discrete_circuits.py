"""Discrete circuits: heads that say something only where the task can be solved.

Every head's output at the last position becomes one whole number, its loudest latent. A head
whose numbers occur in solvable examples but not in corrupted twins takes part in the task.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Budget, Card, GossamerError, Method, Unstructured, check_count
from gossamer.methods.features.circuits.codes import (
    edge_scores,
    fit_codes,
    head_codes,
    head_scores,
)
from gossamer.methods.features.circuits.data import Pairs, as_pairs
from gossamer.methods.features.circuits.heads import (
    ablated,
    head_inputs,
    head_outputs,
    output_sites,
)
from gossamer.models import Applied, Progress, Report, SiteRow, State, Tokens

__all__ = ["Circuit", "DiscreteCircuits", "FoundCircuit"]

_STORED = ("counts", "shares", "edges", "positive", "negative")


@dataclass(frozen=True)
class Circuit:
    """Heads ranked by how much of what they say belongs to a task.

    Parameters
    ----------
    counts : float64 (L, H), codes that occur in solvable examples alone.
    shares : float64 (L, H), the same divided by how many codes the head uses.
    edges : float64 (L H, L H), pairs of codes that occur together in solvable examples alone.
    positive, negative : int64 (N, L H), every head's code for every solvable and every corrupted
        example; -1 where no latent speaks.
    ranked_by : ``counts`` or ``shares``.
    """

    counts: Tensor
    shares: Tensor
    edges: Tensor
    positive: Tensor
    negative: Tensor
    ranked_by: str

    @property
    def scores(self) -> Tensor:
        """(L, H), what the heads are ranked by."""
        return self.shares if self.ranked_by == "shares" else self.counts

    def heads(self, sparsity: float) -> Tensor:
        """Bool (L, H): the heads of the circuit when a share of all heads is left out."""
        flat = self.scores.view(1, -1)
        chosen = Unstructured(per="layer").select(flat, Budget(sparsity=sparsity))
        return chosen.mask().view_as(self.scores)

    def ranking(self) -> list[tuple[int, int, float]]:
        """Block, head and score of every head, best first; ties go to the lower place."""
        flat = self.scores.flatten()
        wide = self.scores.shape[1]
        order = flat.argsort(descending=True, stable=True).tolist()
        return [(at // wide, at % wide, float(flat[at])) for at in order]


@dataclass(frozen=True, kw_only=True)
class DiscreteCircuits(Method):
    """Find the heads a task needs from a few examples, and silence all others.

    :meth:`find` ranks the heads, with forward passes only. :meth:`apply` then leaves the circuit
    alone at work: every other head hands over its mean over the corrupted twins, whatever it
    sees. Data are templated examples (``gossamer.models.templates.batch``), a pair of solvable
    and corrupted windows, or windows, which are then corrupted by shuffling.

    Parameters
    ----------
    sparsity : share of the heads left out of the circuit.
    rank : ``shares`` or ``counts`` of codes; counts favour heads that use many codes anyway.
    latents : of the dictionary that all heads share.
    penalty : weight of its L1 term.
    train_on : examples it is trained on, half of them corrupted; the others only get codes.
    steps : updates, all examples in each. lr : their rate.
    seed : of the first atoms.

    Source: arXiv 2405.12522, §3. Departs from the paper: the fraction of codes is the default
    score, the count the option; a silent head has a code of its own; inputs are scaled to
    norm sqrt(D), and penalty and rate suit that; the encoder has no unit norm.
    """

    card: ClassVar[Card] = Card(
        title="Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in "
        "Language Models",
        year=2024,
        arxiv="2405.12522",
        system="discrete_circuits",
        family="features",
        when="after training",
        start="dense",
        masks="static",
        site="attention head",
        score="share of a head's codes that occur in solvable examples alone",
        pattern="whole heads",
        budget="a share of all heads",
        update="none; heads outside the circuit are replaced by their mean",
        departs="share of codes instead of their count; a silent head has its own code; penalty "
        "and rate for inputs of norm sqrt(width); no unit norm of the encoder",
    )
    example: ClassVar[Mapping[str, Any]] = {"latents": 32, "steps": 20, "sparsity": 0.5}
    exempt: ClassVar[Mapping[str, str]] = {
        "encoders": "codes are read where the next token is predicted; encoders predict none",
    }

    sparsity: float = 0.75
    rank: str = "shares"
    latents: int = 200
    penalty: float = 0.5
    train_on: int = 10
    steps: int = 300
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank not in ("shares", "counts"):
            raise GossamerError(f"rank is {self.rank!r}; give 'shares' or 'counts'")
        for name, least in (("latents", 1), ("train_on", 2), ("steps", 1)):
            check_count(name, getattr(self, name), least)
        if not 0 <= self.penalty < float("inf"):
            raise GossamerError(f"penalty is {self.penalty!r}; give a number, at least 0")
        if not 0 < self.lr < float("inf"):
            raise GossamerError(f"lr is {self.lr!r}; give a positive number")

    def find(self, model: nn.Module, data: Any, *, progress: Progress | None = None) -> Circuit:
        """Rank the model's heads; the model is not changed.

        Raises
        ------
        GossamerError
            If the data do not pair up, or the model's heads cannot be told apart.
        """
        return self._find(model, as_pairs(data, model, self.seed), progress)

    def _find(self, model: nn.Module, pairs: Pairs, progress: Progress | None) -> Circuit:
        blocks = len(output_sites(model))
        positive, negative = (head_outputs(model, _inputs(model, part)) for part in pairs)
        half = max(1, self.train_on // 2)
        made = fit_codes(
            torch.cat([positive[:half], negative[:half]]),
            latents=self.latents,
            penalty=self.penalty,
            steps=self.steps,
            lr=self.lr,
            seed=self.seed,
            progress=progress,
        )
        good, bad = head_codes(made, positive), head_codes(made, negative)
        return Circuit(
            head_scores(good, bad).view(blocks, -1),
            head_scores(good, bad, share=True).view(blocks, -1),
            edge_scores(good, bad),
            good,
            bad,
            self.rank,
        )

    def apply(
        self, model: nn.Module, data: Any = None, *, progress: Progress | None = None
    ) -> "FoundCircuit":
        """Find the circuit, then silence the heads outside it."""
        pairs = as_pairs(data, model, self.seed)
        circuit = self._find(model, pairs, progress)
        means = head_inputs(model, _inputs(model, pairs.negative)).mean((1, 2))
        return FoundCircuit(self, model, circuit, means)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "FoundCircuit":
        """Silence the heads outside a stored circuit again."""
        parts = {name: tensors[name] for name in _STORED}
        circuit = Circuit(**parts, ranked_by=meta["ranked_by"])
        return FoundCircuit(self, model, circuit, tensors["means"])


def _inputs(model: nn.Module, tokens: Tokens) -> Mapping[str, Tensor]:
    return {"input_ids": tokens.input_ids.to(next(model.parameters()).device)}


class FoundCircuit(Applied):
    """A model in which only the heads of a circuit still see anything.

    Attributes
    ----------
    circuit : the ranking. heads : bool (L, H), those that are left.
    """

    def __init__(
        self, method: DiscreteCircuits, model: nn.Module, circuit: Circuit, means: Tensor
    ) -> None:
        super().__init__(method, model)
        self.circuit, self._means = circuit, means
        self.heads = circuit.heads(method.sparsity)
        self._silence: AbstractContextManager[None] = ablated(model, ~self.heads, means)
        self._silence.__enter__()
        self._join()

    def _undo(self) -> None:
        self._silence.__exit__(None, None, None)

    def state(self) -> State:
        tensors = {name: getattr(self.circuit, name).cpu() for name in _STORED}
        meta = {"ranked_by": self.circuit.ranked_by}
        return State(meta, {**tensors, "means": self._means.cpu()})

    def report(self) -> Report:
        kept = self.heads.double().mean(1).tolist()
        rows = tuple(
            SiteRow(site.name, "heads", site.block, self.heads.shape[1], 1 - share)
            for site, share in zip(output_sites(self.model), kept, strict=True)
        )
        best = ", ".join(f"{b}.{h} ({s:.2f})" for b, h, s in self.circuit.ranking()[:5])
        notes = (
            f"block.head by {self.circuit.ranked_by} of codes of solvable examples alone: {best}",
            "heads outside the circuit hand over their mean; no weight is removed",
        )
        total = self.heads.numel()
        return Report(self.method.to_dict(), rows, "attention heads", total, True, notes)
