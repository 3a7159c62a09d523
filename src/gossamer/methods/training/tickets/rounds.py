"""All rounds of a search for a ticket: train, prune, rewind, again; resumable between rounds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.sparsifier.layers import plain_module
from gossamer.methods.training.sparsifier.masks import world
from gossamer.methods.training.sparsifier.sparsifier import Sparsifier
from gossamer.methods.training.sparsifier.trained import copy_of, put_back
from gossamer.methods.training.tickets.checkpoint import ROUNDS_FILE, read_rounds, write_rounds
from gossamer.methods.training.tickets.rewinding import Rewinding, TicketTrained

if TYPE_CHECKING:
    from gossamer.methods.training.imp import IMP

__all__ = ["Attach", "find_ticket", "kept_as_it_was", "train_rounds"]


@dataclass
class Attach:
    """Attaches one round's masks to an optimizer; from the second round on it rewinds first.

    Attributes
    ----------
    round : 0 is the dense training. start : the update, and so the batch, a loop goes on with.
    sparsity : of this round's masks.
    """

    method: "IMP"
    round: int
    state: Mapping[str, Any] | None
    before: Mapping[str, Tensor] | None
    made: list[Sparsifier] = field(default_factory=list)

    @property
    def start(self) -> int:
        """Update the round goes on with, counted from 0."""
        return self.method.rewind_step if self.round else 0

    @property
    def sparsity(self) -> float:
        """Sparsity of the round."""
        return self.method.sparsity_of(self.round)

    def __call__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        scheduler: Any = None,
        masters: Mapping[str, Tensor] | None = None,
    ) -> Rewinding:
        """As the method's ``attach``; call it once in every round, before the first update."""
        if self.made:
            raise GossamerError(f"round {self.round} was attached twice; attach once in a round")
        sparsifier = Rewinding(
            self.method,
            model,
            optimizer,
            before=self.before,
            masters=masters,
            state=self.state,
            scheduler=scheduler,
        )
        self.made.append(sparsifier)
        return sparsifier


Train = Callable[[nn.Module, Attach], object]


@contextmanager
def kept_as_it_was(
    model: nn.Module, made: Sequence[Sparsifier] = ()
) -> Iterator[dict[str, Tensor]]:
    """Gives a copy of all weights and buffers, and writes it back after an error or interrupt.

    Parameters
    ----------
    made : sparsifiers whose hooks go then.
    """
    before = copy_of(model)
    try:
        yield before
    except BaseException:
        for sparsifier in made:
            sparsifier.remove()
        put_back(model, before)
        raise


def find_ticket(
    method: "IMP",
    model: nn.Module,
    train: Train,
    *,
    folder: str | Path | None = None,
    undo: bool = True,
) -> TicketTrained:
    """Train, prune and rewind in rounds, with a training loop of one's own.

    Parameters
    ----------
    train : function of (model, attach). It makes an optimizer, calls ``attach(model, optimizer)``,
        and trains from update ``attach.start`` to ``method.steps``, with the batches and learning
        rates of those updates. A number that it returns is noted for the round.
    folder : where the state between rounds lies; another call goes on with the round that was
        interrupted, on whatever weights the model then has. None keeps nothing.
    undo : keep a copy of the weights so that ``restore`` works.

    Returns
    -------
    The last round, trained: it reports, saves, restores; ``ticket`` trains it once more, and
    ``rounds`` has the sparsity and the noted number of every round. After an error or an interrupt
    the weights are as before.

    Raises
    ------
    GossamerError
        If ``train`` does not attach, or trains for another number of updates, or the folder holds
        rounds of another method or model.

    Examples
    --------
    ::

        def train(model, attach):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            sparsifier = attach(model, optimizer)
            for step in range(attach.start, method.steps):
                loss(model, batches[step]).backward()
                optimizer.step()
                sparsifier.step()
                optimizer.zero_grad()

        method = IMP(sparsity=0.9, steps=1000)
        applied = find_ticket(method, model, train, folder="rounds")
        print(applied.report())
    """
    if not callable(getattr(method, "sparsity_of", None)) or not callable(train):
        raise GossamerError(
            f"find_ticket trains rounds of IMP by a function train(model, attach); got "
            f"{type(method).__name__} and {type(train).__name__}"
        )
    plain = plain_module(model)
    with kept_as_it_was(plain) as before:
        return train_rounds(method, model, train, before if undo else None, folder)


def train_rounds(
    method: "IMP",
    model: nn.Module,
    train: Train,
    before: Mapping[str, Tensor] | None,
    folder: str | Path | None,
) -> TicketTrained:
    """:func:`find_ticket` for who puts weights back himself.

    Parameters
    ----------
    before : copies that ``restore`` writes back, or None.
    """
    file = None if folder is None else Path(folder) / ROUNDS_FILE
    state, noted, first = None, [], 0
    if file is not None and file.exists():
        state, noted, first = _resumed(method, plain_module(model), file)
    for number in range(first, method.rounds + 1):
        attach = Attach(method, number, state, before)
        try:
            figure = train(model, attach)
            sparsifier = _trained(attach)
            noted.append(_note(sparsifier, figure))
            if number < method.rounds:
                state = sparsifier.next_round()
                if file is not None and _first_rank():
                    write_rounds({"state": state, "rounds": noted}, file)
            else:
                work = sparsifier.finish()
                work.rounds = tuple(noted)
                return work
        finally:
            for made in attach.made:
                made.remove()
    raise AssertionError("the last round returns")


def _resumed(
    method: "IMP", model: nn.Module, file: Path
) -> tuple[dict[str, Any], list[dict[str, float]], int]:
    saved = read_rounds(file)
    state = saved["state"]
    if state["method"] != method.to_dict():
        wrong = [k for k, v in method.to_dict().items() if state["method"].get(k) != v]
        raise GossamerError(
            f"{file.parent} holds rounds of another search ({', '.join(wrong)} differs); go on "
            "with its parameters, or give another folder"
        )
    known = {name for name, _ in model.named_parameters()}
    if not set(state["masks"]) <= known:
        odd = ", ".join(sorted(set(state["masks"]) - known)[:3])
        raise GossamerError(f"{file.parent} holds rounds of another model, with layers {odd}")
    return state, list(saved["rounds"]), int(state["round"])


def _trained(attach: Attach) -> Rewinding:
    if not attach.made:
        raise GossamerError(
            "train did not attach; call sparsifier = attach(model, optimizer) in it, and "
            "sparsifier.step() after every update"
        )
    sparsifier = cast(Rewinding, attach.made[0])
    if sparsifier._stepped:
        sparsifier.step()
    if sparsifier.updates != attach.method.steps:
        raise GossamerError(
            f"round {attach.round} ended at update {sparsifier.updates}, the training lasts "
            f"{attach.method.steps}; train from attach.start to method.steps"
        )
    return sparsifier


def _note(sparsifier: Rewinding, figure: object) -> dict[str, float]:
    note = {"sparsity": sparsifier.sparsity, "operations": sparsifier.flops.total}
    if isinstance(figure, int | float):
        note["figure"] = float(figure)
    return note


def _first_rank() -> bool:
    from torch import distributed

    return world() == 1 or distributed.get_rank() == 0
