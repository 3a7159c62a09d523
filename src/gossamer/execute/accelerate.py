"""Accelerate: every linear layer on the kernel that measures fastest here, or left dense.

Layers of equal shape, type and about equal sparsity share one measurement, which is kept on disk;
a form is taken only where it beats dense by a margin at both ends of a range of batch sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.execute.choose import Group, Measuring, choose
from gossamer.execute.forms import why_none
from gossamer.execute.linear import AcceleratedLinear
from gossamer.kernels.measured import DENSE, ChoiceRow, environment
from gossamer.models import Progress, at_work
from gossamer.models.applied import ACCELERATED

__all__ = ["Accelerated", "accelerate"]

_LEAST = 0.2  # sparsity below which no form can read fewer bytes than the margin asks


@dataclass(frozen=True)
class _Place:
    """A layer and where it hangs in the model."""

    name: str
    layer: nn.Linear
    slots: tuple[tuple[nn.Module, str], ...]
    tied: bool


class Accelerated:
    """A model whose linear layers run as was measured best; a context manager that undoes it.

    Attributes
    ----------
    rows : what was chosen, a row for each group of equal layers and range of batch sizes.
    layers : the modules now in place, by name.
    notes : what was left out, and why, in sentences.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: list[ChoiceRow] = []
        self.layers: dict[str, AcceleratedLinear] = {}
        self.notes: list[str] = []
        self.setting: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        self._rounded = False
        self._works: list[Any] = []
        vars(model)[ACCELERATED] = self
        vars(model)["_apply"] = _Guard(model)

    def restore(self) -> None:
        """Put the model's own layers back, exactly as they were. A second call does nothing.

        A zero's sign is not kept where the dense weights were not.

        Raises
        ------
        GossamerError
            If weights were rounded to another type and the dense ones were not kept.
        """
        dropped = [name for name, place in self._places.items() if not place.layer.weight.numel()]
        if dropped and self._rounded:
            raise GossamerError(
                f"{dropped[0]} and {len(dropped) - 1} more were rounded without keeping the dense "
                "weights; load the model again, or accelerate with keep_dense=True"
            )
        with torch.no_grad():
            for name in dropped:
                self._places[name].layer.weight.data = self.layers[name].dense()
        for name in self.layers:
            self._put(name, self._places[name].layer)
        self.layers.clear()
        self._places.clear()
        while self._works:
            self._works.pop().decelerate()
        vars(self.model).pop(ACCELERATED, None)
        vars(self.model).pop("_apply", None)

    def _drop(self, name: str) -> None:
        """Free the dense weights that the module in place does not keep."""
        if not self.layers[name].keeps_dense:
            # The layer object stays, to be filled again; its memory goes.
            weight = self._places[name].layer.weight
            weight.data = weight.data.new_empty(0)

    def _put(self, name: str, module: nn.Module) -> None:
        for parent, attribute in self._places[name].slots:
            setattr(parent, attribute, module)

    def paused(self) -> "_Paused":
        """While open, the model's own dense layers run; for timing one against the other.

        Raises
        ------
        GossamerError
            If dense weights were not kept.
        """
        if any(not layer.keeps_dense for layer in self.layers.values()):
            raise GossamerError(
                "the dense weights were not kept, so dense cannot run; accelerate with "
                "keep_dense=True"
            )
        return _Paused(self)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the accelerated layers' weights with their zeros."""
        return sum(
            layer.in_features * layer.out_features * layer.kind[1].itemsize
            for layer in self.layers.values()
        )

    @property
    def bytes_stored(self) -> int:
        """Bytes the accelerated layers hold now: every form in use, and dense where kept."""
        forms = sum(form.nbytes for layer in self.layers.values() for form in layer.forms.values())
        kept = [layer.weight for layer in self.layers.values() if layer.keeps_dense]
        return forms + sum({id(w): w.nbytes for w in kept}.values())

    def bytes_moved(self, rows: int = 1) -> int:
        """Bytes of the accelerated layers' weights that a step of so many rows reads."""
        moved = 0
        for layer in self.layers.values():
            name = layer.runs(rows)
            if name == DENSE:
                moved += layer.in_features * layer.out_features * layer.kind[1].itemsize
            else:
                moved += layer.forms[name].nbytes
        return moved

    def __str__(self) -> str:
        setting = self.setting
        where = f" on {setting['device']}" if "device" in setting else ""
        if setting.get("threads"):
            where += f", {setting['threads']} threads"
        count = len(self.layers) or "no"
        head = f"{count} linear layers accelerated{where}"
        if self.layers:
            head += (
                f": {self.bytes_moved() / 1e6:,.1f} MB of their {self.dense_bytes / 1e6:,.1f} MB "
                f"read at 1 row, {self.bytes_stored / 1e6:,.1f} MB stored"
            )
        lines = [head]
        for row in self.rows:
            size = f"{row.shape[0]}x{row.shape[1]}" if len(row.shape) == 2 else ""
            times = ", ".join(f"{n} {ms:.3f}" for n, ms in row.milliseconds.items())
            gain = ""
            if row.chosen != DENSE and DENSE in row.milliseconds:
                gain = f" {row.milliseconds[DENSE] / row.milliseconds[row.chosen]:.2f}x"
            times = f" ({times} ms)" if times else ""
            lines.append(f"  {row.layer} {size} rows {row.rows}: {row.chosen}{gain}{times}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


class _Guard:
    """Stands before a model's conversions: refused as a whole, not after half of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for layer in self.model.modules():
            if isinstance(layer, AcceleratedLinear):
                layer.check_move(fn)
        return type(self.model)._apply(self.model, fn, recurse)


class _Paused:
    """The model's own layers, for as long as it is open."""

    def __init__(self, work: Accelerated) -> None:
        self.work = work

    def __enter__(self) -> None:
        for name in self.work.layers:
            self.work._put(name, self.work._places[name].layer)

    def __exit__(self, *exc: object) -> None:
        for name, layer in self.work.layers.items():
            self.work._put(name, layer)


def accelerate(
    model: nn.Module,
    *,
    rows: Sequence[int] = (1, 4, 16, 128),
    dtype: torch.dtype | None = None,
    keep_dense: bool | None = None,
    margin: float = 0.05,
    launches: bool = True,
    report: Callable[[str], object] | None = print,
    progress: Progress | None = None,
) -> Accelerated:
    """Run a sparse model's linear layers on what measures fastest, never slower than dense.

    ``generate`` works unchanged. Saving writes the weights with their zeros, as before.

    Parameters
    ----------
    rows : last batch size (sequences times tokens) of every range a choice is made for; the
        last range also serves everything beyond it.
    dtype : store weights as float32 or bfloat16, rounding if need be; their own when left out.
    keep_dense : None keeps dense weights where a range runs dense; True always; False never:
        then every range runs on the best form, even where dense is faster.
    margin : share of dense's time that a form must save.
    launches : on a GPU, take no form whose launch costs the host more than dense's does, which
        slows decoding wherever the host is behind, as in plain ``generate``. False where CUDA
        graphs replay the model: then only the device's time counts.
    report : called with the table of choices; None for silence.
    progress : called with (groups done, groups, what).

    Raises
    ------
    GossamerError
        If the model is accelerated already or quantised, or the rows are not ascending.
    """
    if ACCELERATED in vars(model):
        raise GossamerError("the model is accelerated already; call restore() first")
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise GossamerError(
            "the model's weights are quantised and have kernels of their own; load the model in "
            "bfloat16 or float32"
        )
    ends = list(rows)
    if (
        not ends
        or any(type(end) is not int or end < 1 for end in ends)
        or ends != sorted(set(ends))
    ):
        raise GossamerError(f"rows is {rows!r}; give ascending whole numbers, such as (1, 4, 16)")
    work = Accelerated(model)
    work._rounded = dtype is not None
    how = Measuring(ends, dtype, keep_dense, margin, launches)
    try:
        _activations(work, ends, progress)
        if not work._works:
            places = _places(work)
            _fill(work, places, how, progress)
    except BaseException:
        work.restore()
        raise
    if report is not None:
        report(str(work))
    return work


def _activations(work: Accelerated, ends: list[int], progress: Progress | None) -> None:
    """Methods that skip channels while the model runs bring kernels of their own."""
    for method in at_work(work.model):
        own: Any = method
        if not hasattr(own, "accelerate"):
            continue
        table = own.accelerate(tuple(end for end in ends if end <= 16), progress)
        work.rows += table
        if any(row.chosen != DENSE for row in table):
            work._works.append(own)
            work.notes.append(
                f"{method.method.key()} runs the decode steps on its own kernels, so weights "
                "stay dense"
            )


def _places(work: Accelerated) -> list[_Place]:
    """Every plain linear layer, and a note for each kind of module that is none."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    owners: dict[int, int] = {}
    for parent in work.model.modules():
        for attribute, child in parent._modules.items():  # children() skips repetitions
            slots.setdefault(id(child), []).append((parent, attribute))
        for parameter in parent.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found: list[_Place] = []
    skipped: dict[str, list[str]] = {}
    for name, module in work.model.named_modules():
        if type(module) is nn.Linear:
            reason = _unfit(module)
            if reason is None:
                tied = owners[id(module.weight)] > 1
                found.append(_Place(name, module, tuple(slots[id(module)]), tied))
                continue
        elif hasattr(module, "in_features") or type(module).__name__ == "Conv1D":
            reason = f"{type(module).__name__} is no plain nn.Linear"
        else:
            continue
        skipped.setdefault(reason, []).append(name)
    for reason, names in skipped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        work.notes.append(f"{names[0]}{more} left as it is: {reason}")
    return found


def _unfit(layer: nn.Linear) -> str | None:
    if not layer.weight.is_floating_point() or layer.weight.is_meta:
        return f"its weights are {layer.weight.dtype} on {layer.weight.device}"
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    return None


def _fill(
    work: Accelerated, places: list[_Place], how: Measuring, progress: Progress | None
) -> None:
    """Measure group by group and put the chosen forms in place."""
    groups: dict[tuple[Any, ...], Group] = {}
    members: dict[tuple[Any, ...], list[_Place]] = {}
    refused: dict[str, int] = {}
    plain = total = 0
    for place in places:
        weight = place.layer.weight.detach()
        work.setting = work.setting or environment(weight.device)
        total += weight.nbytes
        sparsity = 1.0 - int(weight.count_nonzero()) / max(1, weight.numel())
        if sparsity < _LEAST:
            plain += 1
            continue
        if (reason := why_none(weight, how.dtype)) is not None:
            refused[reason] = refused.get(reason, 0) + 1
            continue
        group = Group.of(weight, sparsity, how.dtype)
        members.setdefault(group.key, []).append(place)
        groups.setdefault(group.key, group)
    if how.launches and work.setting and any(g.device.type == "cuda" for g in groups.values()):
        work.notes.append(
            "forms that take the host longer to launch than dense are not taken; pass "
            "launches=False where CUDA graphs replay the model"
        )
    if plain:
        work.notes.append(f"{plain} layers with less than {_LEAST:.0%} zeros stay dense")
    work.notes += [f"{count} layers stay dense: {reason}" for reason, count in refused.items()]
    for index, (key, group) in enumerate(groups.items()):
        weights = [place.layer.weight.detach() for place in members[key]]
        plan, rows = choose(group, [p.name for p in members[key]], weights, total, how)
        work.rows += rows
        for place in members[key]:
            _replace(work, place, group, plan, how.keep_dense)
        if progress:
            progress(index + 1, len(groups), "accelerating")
    if work._rounded:
        for name in work.layers:
            work._drop(name)


def _replace(
    work: Accelerated,
    place: _Place,
    group: Group,
    plan: list[tuple[int, str]],
    keep_dense: bool | None,
) -> None:
    names = {name for _, name in plan}
    if names == {DENSE}:
        return
    needed = DENSE in names or bool(keep_dense) or place.tied
    weight = place.layer.weight.detach()
    forms = {name: group.offers[name].make(weight) for name in sorted(names - {DENSE})}
    module = AcceleratedLinear(place.layer, plan, forms, needed)
    work._places[place.name] = place
    work.layers[place.name] = module
    work._put(place.name, module)
    if not work._rounded:  # else once all is done: what was rounded cannot be put back
        work._drop(place.name)
