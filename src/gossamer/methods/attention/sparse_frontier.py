"""The Sparse Frontier: make attention sparser and sparser, and stop before the loss shows it.

The protocol, not a pattern: any method of the family climbs a ladder of sparsities on the same
windows as the dense model, and a step counts only if a paired test rules out a loss beyond a
margin. For tasks with answers, and several methods at once, there is ``gossamer recommend``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.core import Card, GossamerError, check_sparsity
from gossamer.core.verdict import Paired, check_margin, non_inferiority
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.index import KeyIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import Progress, State, as_tokens
from gossamer.models.loss import window_losses

__all__ = ["SparseFrontier"]


@dataclass(frozen=True)
class ChosenSelector(Selector):
    """The selector of the rung that was chosen, and what the climb found."""

    inner: Selector
    sparsity: float
    found: tuple[str, ...]

    stateful: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        return self.inner.evicts

    def owns(self, call: Call, layer: int) -> bool:
        return self.inner.owns(call, layer)

    def weighable(self, call: Call, layout: Layout, layer: int) -> bool:
        return self.inner.weighable(call, layout, layer)

    def holds(self, length: int, layer: int) -> tuple[int, ...] | None:
        return self.inner.holds(length, layer)

    def select(self, call: Call, layout: Layout, layer: int) -> KeyIndex:
        return self.inner.select(call, layout, layer)

    def observe(self, call: Call, layout: Layout, layer: int) -> None:
        if self.inner.observes:
            self.inner.observe(call, layout, layer)

    def after(self, call: Call, layout: Layout, layer: int) -> None:
        if self.inner.stateful:
            self.inner.after(call, layout, layer)

    def pairs(self, length: int, layer: int, own: int | None) -> tuple[int, int] | None:
        return self.inner.pairs(length, layer, own)

    def simulated(self, backend: str, length: int) -> bool:
        return self.inner.simulated(backend, length)

    def state(self) -> State:
        own = self.inner.state()
        meta = {"inner": own.meta, "chosen": self.sparsity, "found": list(self.found)}
        return State(meta, own.tensors)

    def notes(self) -> tuple[str, ...]:
        return (*self.found, *self.inner.notes())


@dataclass(frozen=True, kw_only=True)
class SparseFrontier(AttentionMethod):
    """Apply a method at the largest sparsity whose loss is shown to be within a margin.

    The ladder is climbed in order and left at the first failure, so its steps need no correction
    for their number. Where no step passes, attention stays full and the report says so.

    Parameters
    ----------
    base : the method, in text form, such as ``"minference"`` or ``"oracle_top_k:block_size=16"``;
        it acts on prompts and has a sparsity.
    sweep : the ladder, rising, separated by commas.
    margin : loss in nats per token that still counts as none.
    level : chance that a step which loses the margin passes all the same.

    Source: arXiv:2504.17768.
    Departs from the paper: the loss of the data's windows, one score for each, stands for its
    tasks; ``gossamer recommend`` and ``benchmarks/sparse_frontier.py`` judge tasks with answers,
    each by itself. A non-inferiority test with a margin takes the place of the paper's test.

    Examples
    --------
    >>> SparseFrontier(base="minference", sweep="0.5,0.75,0.9").margin
    0.02
    """

    card: ClassVar = Card(
        title="The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs",
        system="sparse_frontier",
        year=2025,
        arxiv="2504.17768",
        family="attention",
        when="inference",
        start="dense",
        masks="dynamic",
        site="attention scores",
        score="of the method it judges",
        pattern="of the method it judges",
        budget="the largest sparsity that a paired non-inferiority test passes",
        schedule="a rising ladder, left at the first failure",
        kernel="of the method it judges",
        departs="the loss of windows of text stands for the tasks; tasks with answers are judged "
        "by gossamer recommend; a non-inferiority margin in place of the paper's test",
    )
    selects: ClassVar = False
    full: ClassVar = {"sweep": "0"}
    example: ClassVar = {"base": "streaming_llm:sink=1", "sweep": "0.5", "margin": 100.0}
    peeks: ClassVar = "as the method it judges"
    chunked: ClassVar = "as the method it judges"
    exempt: ClassVar = {
        "dense at sparsity 0": "the sparsity is what the method looks for",
        "encoders": "the family works on causal decoders",
    }

    base: str = "minference"
    sweep: str = "0.25,0.5,0.75,0.9"
    margin: float = 0.02
    level: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin)
        if not isinstance(self.level, int | float) or not 0 < self.level < 1:
            raise GossamerError(f"level is {self.level!r}; give a chance between 0 and 1, as 0.05")
        rungs = self.rungs()
        if any(a >= b for a, b in pairwise(rungs)):
            raise GossamerError(f"sweep is {self.sweep!r}; let the sparsities rise")
        self.at(rungs[0])

    def rungs(self) -> tuple[float, ...]:
        """The ladder's sparsities."""
        words = [word.strip() for word in str(self.sweep).split(",") if word.strip()]
        if not words:
            raise GossamerError(f"sweep is {self.sweep!r}; give sparsities such as 0.5,0.75")
        return tuple(check_sparsity(word, "sweep") for word in words)  # type: ignore[arg-type]

    def at(self, sparsity: float) -> AttentionMethod:
        """The method at a sparsity."""
        from gossamer import methods

        key = methods.split_text(self.base)[0]
        made = methods.parse_method(self.base, sparsity=sparsity)
        if not isinstance(made, AttentionMethod) or not methods.has_field(key, "sparsity"):
            raise GossamerError(
                f"base {self.base!r} is no attention method with a sparsity; give one such as "
                "minference or streaming_llm"
            )
        if "prefill" not in made.phases:
            raise GossamerError(
                f"base {key} acts on decoding only, which the loss of a text does not exercise; "
                "use gossamer recommend"
            )
        return replace(made, length=self.length, backend=self.backend)

    def climb(
        self, model: nn.Module, data: Any, *, progress: Progress | None = None
    ) -> list[tuple[float, Paired]]:
        """Sparsities tried and their comparison with dense; the model is as before afterwards.

        Raises
        ------
        GossamerError
            If the data holds fewer than five windows.
        """
        tokens = as_tokens(data, model)
        rungs, found = self.rungs(), list[tuple[float, Paired]]()

        def scores() -> Any:
            losses = window_losses(model, tokens)
            return -(losses.total / losses.count).numpy()

        dense = scores()
        for done, rung in enumerate(rungs):
            if progress is not None:
                progress(done, len(rungs), f"{self.base} at {rung:g}")
            with self.at(rung).apply(model):
                sparse = scores()
            pair = non_inferiority(dense, sparse, margin=self.margin, level=self.level)
            found.append((rung, pair))
            if pair.p_value > self.level:
                break
        return found

    def plan(self, model: nn.Module, data: Any, length: int) -> ChosenSelector:
        return self.planned(model, data, length, None)

    def planned(
        self, model: nn.Module, data: Any, length: int, progress: Progress | None
    ) -> ChosenSelector:
        if data is None:
            raise GossamerError(
                "sparse_frontier measures the loss on data; give text or at least 5 windows"
            )
        found = self.climb(model, data, progress=progress)
        passed = [rung for rung, pair in found if pair.p_value <= self.level]
        chosen = max(passed, default=0.0)
        words = [
            f"{self.base} at {rung:g}: {pair.drop:+.4f} nats, at most {pair.worst:+.4f}; "
            + ("passes" if pair.p_value <= self.level else "fails")
            for rung, pair in found
        ]
        if not passed:
            words.append("no step passes, so attention stays full")
        inner = self.at(chosen).plan(model, data, length)
        return ChosenSelector(inner, chosen, tuple(words))

    def replan(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ChosenSelector:
        chosen = float(meta["chosen"])
        inner = self.at(chosen).replan(meta["inner"], tensors)
        return ChosenSelector(inner, chosen, tuple(meta["found"]))
