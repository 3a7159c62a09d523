"""Sweep: many dictionaries, on many modules and at many sparsities, from one pass of the model.

The model's forward pass costs more than a dictionary's step; run once, up to the last module any
of them reads, it feeds all. Every dictionary comes out as if it had been trained alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.checkpoint import Checkpoint, describe
from gossamer.methods.features.host import HostPass
from gossamer.methods.features.rules import Rule
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.stream import Stream
from gossamer.methods.features.training import Recipe, Trainer, sample_size
from gossamer.models import Progress

__all__ = ["Run", "train_many"]

_Key = tuple[Any, int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One dictionary of a sweep.

    Parameters
    ----------
    path : of the module, or several, as for :class:`ActivationSource`.
    width : number of latents. rule : its own, not shared with another run. recipe : how to train.
    options : ``layout``, ``sites``, ``skip`` and ``compute`` of :class:`Trainer`.
    """

    path: str | tuple[str, ...]
    width: int
    rule: Rule
    recipe: Recipe
    options: Mapping[str, Any] | None = None

    @property
    def key(self) -> _Key:
        """Runs with the same one read the same batches."""
        return self.path, self.recipe.batch_size


class _Sweep:
    """Sources, streams and trainers of all runs."""

    def __init__(
        self, model: nn.Module, data: Any, runs: Mapping[str, Run], options: Mapping[str, Any]
    ) -> None:
        self.host = HostPass(model, data)
        self.runs = dict(runs)
        self.sources: dict[_Key, ActivationSource] = {}
        self.streams: dict[_Key, Stream] = {}
        self.trainers: dict[str, Trainer] = {}
        for run in self.runs.values():
            if run.key not in self.sources:
                source = ActivationSource(model, run.path, data, host=self.host, **options)
                self.sources[run.key] = source
                self.streams[run.key] = source.batches(run.recipe.batch_size)
        for name, run in self.runs.items():
            sample = self.streams[run.key].peek(sample_size(run.recipe))
            self.trainers[name] = Trainer(
                sample,
                width=run.width,
                rule=run.rule,
                recipe=run.recipe,
                **(run.options or {}),
            )

    def checkpoint(self, path: str | Path) -> Checkpoint:
        """Of every trainer and every stream."""
        parts: dict[str, Any] = {f"stream {i}": s for i, s in enumerate(self.streams.values())}
        trainers = enumerate(self.trainers.values())
        parts |= {f"trainer {i}": trainer for i, trainer in trainers}
        run = {
            name: describe(self.streams[self.runs[name].key], trainer)
            for name, trainer in self.trainers.items()
        }
        return Checkpoint(path, parts, run)

    def left(self, name: str) -> int:
        """Updates a run still needs."""
        return self.runs[name].recipe.steps - self.trainers[name].done

    def turn(self) -> list[str]:
        """One update of every run that is not done; the names of those that now are."""
        active = [name for name in self.trainers if self.left(name) > 0]
        for key in dict.fromkeys(self.runs[name].key for name in active):
            rows = next(self.streams[key])
            for name in active:
                if self.runs[name].key == key:
                    self.trainers[name].step(rows)
                    self.trainers[name].glance()
        finished = [name for name in active if self.left(name) == 0]
        for key in {self.runs[name].key for name in finished}:
            if all(self.left(n) == 0 for n, run in self.runs.items() if run.key == key):
                self.sources[key].close()
        return finished


def train_many(
    model: nn.Module,
    data: Any,
    runs: Mapping[str, Run],
    *,
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    **options: Any,
) -> dict[str, Dictionary]:
    """Train a dictionary for every run, from shared forward passes of the model.

    Parameters
    ----------
    data : windows of tokens, packed documents, or ready-made inputs.
    runs : by name.
    checkpoint : file that all runs are saved to together and taken up from.
    every : rounds of one update each between two saves.
    options : of :class:`ActivationSource`: ``windows``, ``seed``, ``sink_multiple`` and so on.

    Returns
    -------
    Dictionaries by name, each to the bit what training it alone gives.

    Raises
    ------
    GossamerError
        Without a run, when a rule serves two runs, or as for :func:`train`.
    """
    if not runs:
        raise GossamerError("a sweep needs a run; name at least one")
    if len({id(run.rule) for run in runs.values()}) < len(runs):
        raise GossamerError("a rule learns, so it serves one run; make one for each")
    sweep = _Sweep(model, data, runs, options)
    saved = None if checkpoint is None else sweep.checkpoint(checkpoint)
    if saved is not None:
        saved.resume()
    total = sum(run.recipe.steps for run in runs.values())
    rounds = 0
    while any(sweep.left(name) > 0 for name in runs):
        sweep.turn()
        rounds += 1
        done = sum(trainer.done for trainer in sweep.trainers.values())
        if progress is not None:
            progress(done, total, f"{len(runs)} dictionaries")
        if saved is not None and rounds % every == 0 and done < total:
            saved.save()
    made: dict[str, Dictionary] = {}
    for name, run in runs.items():
        made[name] = sweep.trainers[name].finish()
        made[name].metadata |= sweep.sources[run.key].metadata()
    if saved is not None:
        saved.remove()
    return made
