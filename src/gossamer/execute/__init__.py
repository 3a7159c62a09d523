"""Execute: run a sparse model on the kernels that measure fastest, never slower than dense."""

from gossamer.execute.accelerate import Accelerated, accelerate
from gossamer.execute.linear import AcceleratedLinear
from gossamer.execute.timing import Pair, generation

__all__ = ["Accelerated", "AcceleratedLinear", "Pair", "accelerate", "generation"]
