"""Choose: what a group of like layers runs on at every range of batch sizes, by measurement."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.execute.forms import Form, Offer, offers
from gossamer.kernels.measured import DENSE, ChoiceRow, fastest

__all__ = ["Group", "Measuring", "choose"]

_CACHE = 1 << 26  # bytes that together no cache of a CPU holds
_COPIES = 64

Plan = list[tuple[int, str]]


@dataclass(frozen=True)
class Measuring:
    """How choices are made; see :func:`gossamer.execute.accelerate`."""

    ends: list[int]
    dtype: torch.dtype | None
    keep_dense: bool | None
    margin: float
    launches: bool


@dataclass(frozen=True)
class Group:
    """Layers that share a measurement: of one shape, type and offer, and about equally sparse.

    Parameters
    ----------
    bucket : of the density; densities of one bucket lie within 10 % of one another.
    offers : the forms worth timing, by name.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    bucket: int
    sparsity: float
    offers: dict[str, Offer]

    @classmethod
    def of(cls, weight: Tensor, sparsity: float, dtype: torch.dtype | None) -> "Group":
        """The group a weight (O, I) belongs to."""
        bucket = 99 if sparsity >= 1.0 else round(-log(1.0 - sparsity) / 0.1)
        shape = (weight.shape[0], weight.shape[1])
        made = offers(weight, dtype)
        return cls(shape, weight.dtype, weight.device, bucket, sparsity, made)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for the members of a group."""
        return (self.shape, self.dtype, self.device, self.bucket, tuple(sorted(self.offers)))


def choose(
    group: Group, names: list[str], weights: list[Tensor], total: int, how: Measuring
) -> tuple[Plan, list[ChoiceRow]]:
    """The plan of a group, and its rows of the table.

    A form is taken for a range only where it beats dense by the margin at both ends of it.

    Parameters
    ----------
    names, weights : of the members.
    total : bytes of all linear layers of the model: on CPU, what is timed goes through as much
        memory as a step of the model does, up to what a cache may hold.
    """
    forms = {name: _rotation(offer.make, weights, total) for name, offer in group.offers.items()}
    dense = _rotation(lambda weight: weight, weights, total)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    label = f"{names[0]}{more} ({group.sparsity:.0%})"
    plan: Plan = []
    rows: list[ChoiceRow] = []
    low = 1
    for end in how.ends:
        counts = sorted({low, end})
        times = [_time(group, weights[0], dense, forms, count, how) for count in counts]
        best = _best(times, how)
        plan.append((end, best))
        text = str(low) if low == end else f"{low} to {end}"
        if end == how.ends[-1]:
            text += " and more"
        rows.append(
            ChoiceRow(label, group.shape, text, best, times[-1] if len(times[-1]) > 1 else {})
        )
        low = end + 1
    return plan, rows


def _best(times: list[dict[str, float]], how: Measuring) -> str:
    """The form whose worst share of dense's time is least; dense unless that saves the margin."""
    common = [name for name in times[0] if all(name in each for each in times) and name != DENSE]
    cost = {name: max(each[name] / each[DENSE] for each in times) for name in common}
    best = min(cost, key=lambda name: cost[name], default=DENSE)
    if best == DENSE or (cost[best] > 1.0 - how.margin and how.keep_dense is not False):
        return DENSE
    return best


def _rotation(
    make: Callable[[Tensor], Any], weights: list[Tensor], total: int
) -> Callable[[], Any]:
    """What ``make`` gives for one member after the other, and copies where they are too few.

    On CPU they are as many as a step of the model goes through, or as no cache holds; on a GPU
    one, since its cache is emptied between calls.
    """
    made = [make(weights[0])]
    count = 1
    if weights[0].device.type == "cpu":
        count = ceil(min(_CACHE / max(1, made[0].nbytes), total / max(1, weights[0].nbytes)))
    for index in range(1, min(_COPIES, count)):
        weight = weights[index % len(weights)]
        made.append(make(weight if index < len(weights) else weight.clone()))
    turn = itertools.cycle(made)
    return lambda: next(turn)


def _time(
    group: Group,
    weight: Tensor,
    dense: Callable[[], Tensor],
    forms: dict[str, Callable[[], Form]],
    count: int,
    how: Measuring,
) -> dict[str, float]:
    """Milliseconds of a product of so many rows, by form."""
    generator = torch.Generator(weight.device).manual_seed(count)
    x = torch.randn(count, group.shape[1], device=weight.device, generator=generator)
    x = x.to(weight.dtype)
    calls: dict[str, Callable[[], object]] = {DENSE: lambda: linear(x, dense())}
    for name, form in forms.items():
        if group.offers[name].least <= count <= group.offers[name].most:
            calls[name] = lambda form=form: form()(x, None)
    if len(calls) == 1:
        return {DENSE: 0.0}
    stored = group.dtype if how.dtype is None else how.dtype
    size = f"{group.shape[0]}x{group.shape[1]}"
    key = f"linear {size} {group.dtype} as {stored} density {group.bucket} rows {count}"
    choice = fastest(
        key,
        calls,
        device=weight.device,
        margin=how.margin,
        launches=how.launches,
        flush=False,
    )
    return choice.milliseconds
