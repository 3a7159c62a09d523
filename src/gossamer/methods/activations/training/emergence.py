"""How sparse hidden activations are by themselves: layer by layer, and over training.

Source of the metric: arXiv 2210.06313, §2 (share of non-zero entries behind the ReLU, averaged
over tokens).
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gossamer.core import GossamerError
from gossamer.methods.activations.training.hidden import Activity, measure_activity
from gossamer.methods.activations.training.trained import as_data

__all__ = ["Emergence"]


@dataclass
class Emergence:
    """A record of non-zero shares per layer at moments of training.

    Call :meth:`record` at initialisation, in any training loop, and at the end; printing shows
    one row a layer and one column a moment.

    Parameters
    ----------
    tolerance : entries of at most this size count as zero. 0 sees only what ReLU-like functions
        make; for SiLU and GELU give the size below which an entry may be dropped.
    """

    tolerance: float = 0.0
    moments: dict[int, dict[str, Activity]] = field(default_factory=dict)

    def record(self, step: int, model: nn.Module, data: Any = None, *, batch_size: int = 8) -> None:
        """Measure a transformers model on data and keep it under this step.

        Parameters
        ----------
        data : see :func:`gossamer.models.as_tokens`; ``Inputs`` for models of other inputs. The
            same data at every step makes the moments comparable.
        """
        self.moments[step] = measure_activity(
            model, as_data(data, model), tolerance=self.tolerance, batch_size=batch_size
        )

    def nonzero(self, step: int) -> float:
        """Mean over layers of the non-zero share at a recorded step."""
        if step not in self.moments:
            known = ", ".join(map(str, self.moments)) or "none"
            raise GossamerError(f"nothing was recorded at step {step}; recorded steps: {known}")
        layers = self.moments[step].values()
        return sum(layer.nonzero for layer in layers) / len(layers)

    def fall(self) -> float:
        """Non-zero share at the last recorded step, as a share of that at the first."""
        steps = sorted(self.moments)
        if len(steps) < 2:
            raise GossamerError("a fall needs two recorded steps; record one before training")
        return self.nonzero(steps[-1]) / self.nonzero(steps[0])

    def to_dict(self) -> dict[str, Any]:
        """As plain values: step to layer to share."""
        return {
            "tolerance": self.tolerance,
            "nonzero": {
                str(step): {name: layer.nonzero for name, layer in layers.items()}
                for step, layers in sorted(self.moments.items())
            },
        }

    def __str__(self) -> str:
        steps = sorted(self.moments)
        if not steps:
            return "no step recorded"
        names = list(self.moments[steps[0]])
        wide = max(len(name) for name in [*names, "mean"])
        head = f"{'non-zero share at step':<{wide}} " + " ".join(f"{s:>8}" for s in steps)
        rows = [
            f"{name:<{wide}} " + " ".join(f"{self.moments[s][name].nonzero:8.2%}" for s in steps)
            for name in names
        ]
        mean = f"{'mean':<{wide}} " + " ".join(f"{self.nonzero(s):8.2%}" for s in steps)
        return "\n".join([head, *rows, mean])
