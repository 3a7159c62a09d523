"""A model with CRATE blocks at work: rates layer by layer, undo, saving."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from torch import nn

from gossamer.core import Method
from gossamer.methods.activations.crate_blocks.block import CRATEBlock
from gossamer.methods.activations.crate_blocks.rates import LayerRates, measure_rates
from gossamer.methods.activations.training.trained import as_data
from gossamer.models import Applied, Report, SiteRow, State

__all__ = ["CRATEModel"]


class CRATEModel(Applied):
    """A model whose blocks are CRATE blocks.

    Parameters
    ----------
    undo : closed by ``restore``; puts the old blocks and weights back.
    blocks : by path. rates : measured at the end of training, or before saving.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        undo: ExitStack,
        blocks: Mapping[str, CRATEBlock],
        rates: Mapping[str, LayerRates],
        *,
        losses: tuple[float, ...] = (),
        trained: bool = True,
    ) -> None:
        super().__init__(method, model)
        self.blocks, self.rates, self.losses = dict(blocks), dict(rates), losses
        self.trained = trained
        self._stack = undo
        self._join()

    def _undo(self) -> None:
        self._stack.close()

    def measure(self, data: Any, *, batch_size: int = 32) -> dict[str, LayerRates]:
        """Rates and non-zero shares on data; :meth:`report` then shows these."""
        self.rates = measure_rates(
            self.model, self.blocks, as_data(data, self.model), batch_size=batch_size
        )
        return self.rates

    def state(self) -> State:
        """The blocks' weights, and what was measured."""
        tensors = {
            f"{path}.{name}": value.clone()
            for path, block in self.blocks.items()
            for name, value in block.state_dict().items()
        }
        rates = {name: asdict(value) for name, value in self.rates.items()}
        heads = next(iter(self.blocks.values())).compress.heads
        return State({"heads": heads, "rates": rates, "trained": self.trained}, tensors)

    def report(self) -> Report:
        """Share of zeros among the features behind every block."""
        rows = tuple(
            SiteRow(
                path,
                "block",
                index,
                block.sparsify.dictionary.shape[0],
                1.0 - self.rates[path].nonzero,
            )
            for index, (path, block) in enumerate(self.blocks.items())
        )
        rates = [self.rates[row.name] for row in rows]
        weights = sum(p.numel() for block in self.blocks.values() for p in block.parameters())
        return Report(
            method=self.method.to_dict(),
            rows=rows,
            unit="token features",
            all_size=sum(row.size for row in rows),
            simulated=self.simulated,
            notes=(
                "R behind each block (nats): " + ", ".join(f"{r.rate:.2f}" for r in rates),
                "Rᶜ behind each compression (nats): "
                + ", ".join(f"{r.compressed:.2f}" for r in rates),
                f"the CRATE blocks hold {weights:,} parameters",
            ),
            warnings=(
                "a saved folder holds CRATE blocks; only gossamer.load puts them in place",
                *(() if self.trained else ("the blocks are untrained; give steps",)),
            ),
        )
