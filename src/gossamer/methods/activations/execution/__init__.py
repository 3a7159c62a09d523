"""Execution: decode steps that read only what the gates leave, on the gathered products.

The plan is the gates themselves: masked and gathered execution read the same cuts.
"""

from gossamer.methods.activations.execution.choice import How
from gossamer.methods.activations.execution.decide import Prediction, bandwidth, predict
from gossamer.methods.activations.execution.execution import Execution, accelerate

__all__ = ["Execution", "How", "Prediction", "accelerate", "bandwidth", "predict"]
