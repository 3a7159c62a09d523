"""FATReLU: a ReLU that lets only values from a threshold on pass."""

import torch
from torch import Tensor, nn

__all__ = ["FATReLU"]


class FATReLU(nn.Module):
    """ReLU with a lifted threshold: x where x >= threshold, else 0; NaN stays NaN.

    Parameters
    ----------
    threshold : at least 0; 0 is ReLU.

    Source: arXiv 2402.13516, §3.3.
    """

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.threshold <= 0 else x.masked_fill(x < self.threshold, 0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}"
