"""A network over a stream with delta layers at work: it counts, undoes itself, is saved."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gossamer.core import Method
from gossamer.methods.activations.streams.delta import DeltaLayer
from gossamer.methods.activations.streams.play import play
from gossamer.models import Applied, Report, SiteRow, State

__all__ = ["DeltaStream"]


class DeltaStream(Applied):
    """A network whose linear layers compute with changes.

    A call of the model is the next frame of the stream; :meth:`reset` begins a new clip. Changes
    are multiplied densely, zeros included, so ``simulated`` is True.

    Parameters
    ----------
    undo : closed by ``restore``. deltas : by path of the layer.
    counts : per layer (done, dense) multiply-adds over all frames, then without the first.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        undo: ExitStack,
        deltas: Mapping[str, DeltaLayer],
        counts: Mapping[str, tuple[int, int, int, int]],
        *,
        losses: tuple[float, ...] = (),
    ) -> None:
        super().__init__(method, model)
        self.deltas, self.counts, self.losses = dict(deltas), dict(counts), losses
        self._stack = undo
        self._join()

    def _undo(self) -> None:
        self._stack.close()

    def reset(self) -> None:
        """Begin a new clip: the next frame is compared with nothing."""
        for delta in self.deltas.values():
            delta.reset()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While open, count the multiply-adds of forward passes; :meth:`report` then shows them."""
        for delta in self.deltas.values():
            delta.clear()
            delta.counting = True
        try:
            yield
        finally:
            for delta in self.deltas.values():
                delta.counting = False
        self.counts = {
            name: (d.done, d.dense, d.later_done, d.later_dense) for name, d in self.deltas.items()
        }

    def measure(self, clips: Tensor) -> dict[str, float]:
        """Share of multiply-adds skipped by every layer over clips (N, T, ...)."""
        with self.measuring():
            play(self.model, clips)
        return {name: _skipped(done, dense) for name, (done, dense, *_) in self.counts.items()}

    def state(self) -> State:
        """The trained weights of the network, and what was counted."""
        tensors = {name: value.clone() for name, value in self.model.state_dict().items()}
        return State({"counts": {name: list(c) for name, c in self.counts.items()}}, tensors)

    def report(self) -> Report:
        """Share of multiply-adds skipped, layer by layer; the first frame of a clip counts too."""
        rows = tuple(
            SiteRow(name, "linear", index, dense, _skipped(done, dense))
            for index, (name, (done, dense, _, _)) in enumerate(self.counts.items())
        )
        totals: list[Any] = [sum(column) for column in zip(*self.counts.values(), strict=True)]
        done, dense, later, later_dense = totals
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="multiply-adds",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=(
                f"multiply-adds: {done:,} of {dense:,} ({1 - _skipped(done, dense):.1%}) on the "
                "clips measured",
                f"without the first frame of each clip {1 - _skipped(later, later_dense):.1%}",
            ),
        )


def _skipped(done: int, dense: int) -> float:
    return 1.0 - done / dense if dense else 0.0
