"""Mobile blocks: a depthwise convolution mixes positions, pointwise ones mix channels.

Plain torch modules whose pointwise convolutions :class:`SparseConvNets` prunes, and whose
normalisations and clamps its kernel takes over in evaluation mode.
"""

from torch import Tensor, nn

__all__ = ["InvertedResidual", "SeparableBlock", "convolution"]


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, clamp: bool = True
) -> list[nn.Module]:
    """Convolution without bias, batch normalisation, and ReLU6 unless ``clamp`` is off."""
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if clamp else [])]


class SeparableBlock(nn.Sequential):
    """Depthwise 3x3, then pointwise: the block of MobileNetV1.

    Parameters
    ----------
    inputs, outputs : channels. stride : of the depthwise convolution.

    Source: arXiv 1704.04861, §3.1.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            *convolution(inputs, inputs, 3, stride, groups=inputs), *convolution(inputs, outputs)
        )


class InvertedResidual(nn.Module):
    """Widen, depthwise 3x3, narrow without activation, and add the input: that of MobileNetV2.

    Parameters
    ----------
    inputs, outputs : channels. stride : of the depthwise convolution; the input is added when it
        is 1 and the channels are equal. expand : how many times wider the inside is.

    Source: arXiv 1801.04381, §3.4.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expand: int = 6) -> None:
        super().__init__()
        inside = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *convolution(inputs, inside),
            *convolution(inside, inside, 3, stride, groups=inside),
            *convolution(inside, outputs, clamp=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.body(x)
        return x + y if self.adds else y
