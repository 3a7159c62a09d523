"""What it costs the loss to remove a query-key pair, from one backward pass.

With g the gradient of the loss with respect to an attention weight A, removing a pair and
renormalising the rest of its row changes the loss, to first order, by
E_ij = -A_ij (g_ij - sum_n A_in g_in) / (1 - A_ij): positive where removal hurts.
The sum over n is the product of a row's output with its gradient, so no row but those at hand is
ever needed, and no T x T matrix exists.
Shapes: B = batch, G = key-value heads, R = query heads per key-value head, Q = queries, K = keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.core.scores.attention_estimate import diagonal_sums
from gossamer.methods.attention.applied import SparseAttention
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import run
from gossamer.methods.attention.index import FullIndex
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.selector import Selector
from gossamer.models import Inputs, Progress, State, Tokens
from gossamer.models.capture import evaluating
from gossamer.models.fit import undisturbed
from gossamer.models.gradient import own_loss

if TYPE_CHECKING:
    from gossamer.methods.attention.base import AttentionMethod

__all__ = [
    "Influence",
    "answered",
    "lag_influence",
    "profile",
    "removal_influence",
    "samples_of",
]

_SCORES = 1 << 24
"""Attention weights held at once."""


def removal_influence(
    weight: Tensor, gradient: Tensor, expected: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """First-order rise of the loss when one weight is removed and its row renormalised.

    Parameters
    ----------
    weight : (..., K), attention weights; rows sum to 1. gradient : (..., K), of the loss.
    expected : (..., 1), sum of weight * gradient over the row; None computes it.
    eps : where a weight leaves less than this to the others, nothing can take its place, and the
        loss changes by -weight * gradient.

    >>> removal_influence(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]))
    tensor([-1.,  1.])
    """
    if expected is None:
        expected = (weight * gradient).sum(-1, keepdim=True)
    rest = 1.0 - weight
    moved = weight * (expected - gradient) / rest.clamp_min(eps)
    return torch.where(rest > eps, moved, -weight * gradient)


@torch.no_grad()
def lag_influence(call: Call, layout: Layout, out: Tensor, grad: Tensor, sink: int) -> Tensor:
    """Removal influence of all pairs, summed along diagonals; pairs with sinks count as 0.

    Parameters
    ----------
    call : of one sequence without padding. out, grad : (1, H, Q, E), output and its gradient.
    sink : first keys that are always kept.

    Returns
    -------
    (G, K): entry o is the influence of all pairs whose key lies o tokens before the query, summed
    over the query heads that share keys.
    """
    shared, repeat = call.groups
    query, key = call.grouped_query().to(call.exact), call.key.to(call.exact)
    value = call.value.to(call.exact)
    grad = grad.to(call.exact).view(1, shared, repeat, layout.queries, -1)
    expected = (grad * out.to(call.exact).view(grad.shape)).sum(-1, keepdim=True)
    total = query.new_zeros(shared, layout.keys)
    step = max(1, _SCORES // (shared * repeat * layout.keys))
    for start in range(0, layout.queries, step):
        stop = min(start + step, layout.queries)
        rows = slice(start, stop)
        score = torch.einsum("bgrqd,bgkd->bgrqk", query[:, :, :, rows], key[:, :, :stop])
        score = score * call.factor
        if call.softcap is not None:
            score = call.softcap * torch.tanh(score / call.softcap)
        seen = layout.mask(rows)[..., :stop]
        score = score.masked_fill(~seen[:, :, None], -torch.inf)
        if call.sink_logits is not None:
            extra = call.sink_logits.to(call.exact).view(1, shared, repeat, 1, 1)
            score = torch.cat([score, extra.expand(*score.shape[:-1], 1)], dim=-1)
        weight = score.softmax(-1)[..., :stop]
        slope = torch.einsum("bgrqe,bgke->bgrqk", grad[:, :, :, rows], value[:, :, :stop])
        influence = removal_influence(weight, slope, expected[:, :, :, rows])
        influence[..., :sink] = 0.0
        total[:, :stop] += diagonal_sums(influence.sum((0, 2)))
    return total


@dataclass(frozen=True)
class _Everything(Selector):
    """Removes nothing."""

    def select(self, call: Call, layout: Layout, layer: int) -> FullIndex:
        return FullIndex(layout)

    def simulated(self, backend: str, length: int) -> bool:
        return False

    def state(self) -> State:
        return State()


class _Probe(SparseAttention):
    """Full attention that adds up the influence of its pairs in every backward pass."""

    def __init__(self, method: "AttentionMethod", model: nn.Module, length: int, sink: int) -> None:
        self.sums: dict[int, Tensor] = {}
        self.sink = sink
        super().__init__(method, model, _Everything(), length)

    def _attend(self, call: Call, layout: Layout, layer: int) -> Tensor:
        index = FullIndex(layout)
        out = run("dense", call, index)
        # Nothing below may want gradients, so a term of zeros stands in for the output.
        term = torch.zeros_like(out, requires_grad=True)

        def take(grad: Tensor) -> None:
            found = lag_influence(call, layout, out.detach(), grad, self.sink)
            self.sums[layer] = self.sums[layer] + found if layer in self.sums else found

        term.register_hook(take)
        return out + term


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence by distance at one length, the mean over samples.

    Parameters
    ----------
    length : tokens. lags : (G, length) of each layer.
    """

    length: int
    lags: tuple[Tensor, ...]

    def outside(self, layer: int) -> Tensor:
        """(G, length + 1): entry s is the influence of all pairs at least s tokens apart."""
        lags = self.lags[layer].double()
        tails = lags.flip(-1).cumsum(-1).flip(-1)
        return torch.nn.functional.pad(tails, (0, 1))


@torch.no_grad()
def answered(model: nn.Module, ids: Tensor, answer: int) -> dict[str, Tensor]:
    """A prompt and what the model itself says next, with the loss on that only.

    Parameters
    ----------
    ids : (1, T). answer : tokens generated, the likeliest each time; 0 generates none and scores
        what the model holds likeliest after every token of the prompt.

    A trained model's loss on real text is nearly flat to first order; that of its own choices is
    not, whatever makes it less sure of them raises it.
    """
    if not answer:
        labels = torch.full_like(ids, -100)
        out: Any = model(input_ids=ids, use_cache=False)
        labels[:, 1:] = out.logits[:, :-1].argmax(-1)
        return {"input_ids": ids, "labels": labels}
    step, cache, whole = ids, None, ids
    for _ in range(answer):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        whole = torch.cat([whole, step], dim=1)
    labels = whole.clone()
    labels[:, : ids.shape[1]] = -100
    return {"input_ids": whole, "labels": labels}


def samples_of(
    model: nn.Module, data: Tokens | Inputs, length: int, answer: int
) -> list[dict[str, Tensor]]:
    """Texts of at most ``length`` tokens and what is scored of them, always the model's own choice.

    Parameters
    ----------
    data : windows, each cut to its last tokens, with room for an answer of at most half the
        length; or inputs with ``labels``, where the places that have a label are scored.
    answer : tokens generated behind a window; see :func:`answered`.
    """
    device = next(model.parameters()).device
    if isinstance(data, Inputs):
        ids = data.values["input_ids"][:, -length:].to(device)
        marked = data.values["labels"][:, -length:].to(device) != -100
        return [_chosen(model, ids[row : row + 1], marked[row]) for row in range(len(ids))]
    found = []
    for row in range(len(data)):
        real = data.input_ids[row][data.attention_mask[row]]
        room = min(answer, length // 2)
        prompt = real[None, -max(1, length - room) :].to(device)
        found.append(answered(model, prompt, room))
    return found


@torch.no_grad()
def _chosen(model: nn.Module, ids: Tensor, marked: Tensor) -> dict[str, Tensor]:
    """A text (1, T) with the model's likeliest token as the label of every marked place."""
    sample = answered(model, ids, 0)
    return {**sample, "labels": sample["labels"].masked_fill(~marked, -100)}


def profile(
    method: "AttentionMethod",
    model: nn.Module,
    data: Tokens | Inputs,
    lengths: Sequence[int],
    *,
    answer: int,
    sink: int,
    progress: Progress | None = None,
) -> tuple[Influence, ...]:
    """Influence by distance of every layer and key-value head, at several lengths.

    Parameters
    ----------
    data, answer : what is read and scored, see :func:`samples_of`.
    sink : first tokens whose pairs do not count.
    """
    found: list[Influence] = []
    with undisturbed(model), evaluating(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for number, length in enumerate(lengths):
            samples = samples_of(model, data, length, answer)
            with _Probe(method, model, length, sink) as probe, torch.enable_grad():
                for row, sample in enumerate(samples):
                    own_loss(model, sample).backward()
                    if progress is not None:
                        done = number * len(samples) + row + 1
                        progress(done, len(lengths) * len(samples), f"profiling {length} tokens")
            lags = [_padded(probe.sums[layer], length) for layer in sorted(probe.sums)]
            found.append(Influence(length, tuple(lag / len(samples) for lag in lags)))
    return tuple(found)


def _padded(lags: Tensor, length: int) -> Tensor:
    """Shorter texts have no pairs that far apart."""
    return torch.nn.functional.pad(lags, (0, length - lags.shape[1]))
