"""Windows: which tokens are scored, and what each of them may look back on.

Shapes: N = windows, T = tokens of a window.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.models import Tokens

__all__ = ["Windows", "windows"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens, each with the tokens that count.

    Parameters
    ----------
    input_ids : (N, T) int64.
    attention_mask : (N, T) bool, True at real tokens.
    scored : (N, T) bool, True where the token is predicted from those before it and counted.
        The first real token of a window has nothing before it and is never scored.
    stride : distance between the starts of two windows; T when they are disjoint.
    """

    input_ids: Tensor
    attention_mask: Tensor
    scored: Tensor
    stride: int

    @property
    def context(self) -> int:
        """Tokens of a window: the most that a prediction can look back on, plus one."""
        return self.input_ids.shape[1]

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    def fingerprint(self) -> str:
        """Equal for two sets of windows exactly when they score the same tokens alike."""
        digest = hashlib.sha256(f"{tuple(self.input_ids.shape)} {self.stride}".encode())
        for tensor in (self.input_ids, self.attention_mask, self.scored):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def batches(
        self, size: int, device: torch.device
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs of a model and the mask of scored tokens, ``size`` windows at a time.

        The attention mask is left out when a batch has no padding, so that a model can take
        its faster path for it.
        """
        for start in range(0, len(self.input_ids), size):
            rows = slice(start, start + size)
            inputs = {"input_ids": self.input_ids[rows].to(device)}
            mask = self.attention_mask[rows]
            if not bool(mask.all()):
                inputs["attention_mask"] = mask.long().to(device)
            yield inputs, self.scored[rows].to(device)


def windows(tokens: Tokens, stride: int | None = None) -> Windows:
    """Cut tokens into windows for scoring.

    Parameters
    ----------
    tokens : (N, T) with padding marked.
    stride : None takes the rows as disjoint windows. A number reads the rows, in order and
        without their padding, as one text, and moves a window of T tokens over it by that many:
        each token is then scored exactly once, with at least T - stride tokens before it (the
        first window excepted). The last window is moved back to end with the text, so all
        windows have the same length. Stride T gives disjoint windows of the joined text.

    Raises
    ------
    GossamerError
        If the stride is outside 1 to T, or no token can be scored.
    """
    ids, mask = tokens.input_ids, tokens.attention_mask.bool()
    length = ids.shape[1]
    if stride is None:
        scored = torch.zeros_like(mask)
        scored[:, 1:] = mask[:, 1:] & mask[:, :-1]
        cut = Windows(ids, mask, scored, length)
    else:
        if not isinstance(stride, int) or not 1 <= stride <= length:
            raise GossamerError(
                f"stride is {stride!r}; it is a whole number of tokens from 1 to the windows' "
                f"length {length}"
            )
        cut = _sliding(ids[mask], length, stride)
    if not cut.count:
        raise GossamerError(
            f"no token can be scored in {len(ids)} windows of {length}; "
            "give text of at least two tokens"
        )
    return cut


def _sliding(text: Tensor, length: int, stride: int) -> Windows:
    """Windows over one text, each scoring what the windows before it did not reach."""
    total = len(text)
    length = min(length, total)
    starts = [0]
    while length and starts[-1] + length < total:
        starts.append(min(starts[-1] + stride, total - length))
    first = torch.tensor(starts)
    positions = first[:, None] + torch.arange(length)
    # A window's new tokens begin where the one before it ended.
    reached = torch.cat([first.new_zeros(1), first[:-1] + length])
    scored = positions >= reached[:, None]
    scored[:, :1] = False
    ids = text[positions] if total else text.new_zeros(1, 0)
    return Windows(ids, torch.ones_like(scored), scored, stride)
