"""AcceleratedLinear: takes a linear layer's place and runs each batch size as was measured best."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.core import GossamerError
from gossamer.execute.forms import Form
from gossamer.kernels.measured import DENSE

__all__ = ["AcceleratedLinear"]


class AcceleratedLinear(nn.Module):
    """x Wᵀ + bias by the form that the number of rows of x calls for; for inference.

    Saved and listed as the layer it replaces: its state is ``weight`` (with zeros) and ``bias``.

    Parameters
    ----------
    layer : the layer it replaces; its parameters are shared.
    plan : (most rows, name of a form or ``dense``) in ascending order; the last holds for any
        number of rows beyond as well.
    forms : what the plan names.
    keep_dense : whether W stays stored with its zeros.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        layer: nn.Linear,
        plan: Sequence[tuple[int, str]],
        forms: dict[str, Form],
        keep_dense: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.plan = tuple(plan)
        self.forms = forms
        self.kind = (layer.weight.device, layer.weight.dtype)
        self.bias = layer.bias
        if keep_dense:
            # Not by name: the attribute exists before, made anew at every reading.
            self._parameters["weight"] = cast(nn.Parameter, layer.weight)
        self.train(layer.training)

    @property
    def keeps_dense(self) -> bool:
        """Whether W is stored with its zeros as well."""
        return "weight" in self._parameters

    def __getattr__(self, name: str) -> Any:
        """``weight`` can be read also where it is not kept; writing to that changes nothing."""
        return (
            self.dense() if name == "weight" and not self.keeps_dense else super().__getattr__(name)
        )

    def dense(self) -> Tensor:
        """W, (O, I), with its zeros; made anew where it is not kept."""
        if self.keeps_dense:
            return self._parameters["weight"].detach()  # type: ignore[union-attr]
        return next(iter(self.forms.values())).to_dense().to(self.kind[1])

    def runs(self, rows: int) -> str:
        """Name of the form that a product of so many rows runs on."""
        for most, name in self.plan:
            if rows <= most:
                return name
        return self.plan[-1][1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Raises
        ------
        GossamerError
            In training mode with gradients: the weights would get none.
        """
        if self.training and torch.is_grad_enabled():
            raise GossamerError(
                "the model is accelerated and in training mode, where its weights get no "
                "gradients; call restore() of what accelerate returned, or model.eval()"
            )
        name = self.runs(x.numel() // max(1, self.in_features))
        if name == DENSE or x.dtype != self.kind[1]:
            weight = self.weight if self.keeps_dense else self.dense()
            return linear(x, weight.to(x.dtype), self.bias)
        return self.forms[name](x, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AcceleratedLinear":
        self.check_move(fn)
        return super()._apply(fn, recurse)

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Refuse a conversion that the forms in use cannot follow."""
        device, dtype = self.kind
        moved = fn(torch.empty(0, device=device, dtype=dtype))
        if (moved.device, moved.dtype) != self.kind:
            raise GossamerError(
                f"the model is accelerated for {device} and {str(dtype).removeprefix('torch.')}; "
                "call restore() of what accelerate returned before moving or converting it"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        if not self.keeps_dense:
            destination[prefix + "weight"] = self.dense()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        raise GossamerError(
            f"{prefix.rstrip('.')} is accelerated; call restore() of what accelerate returned "
            "before loading weights"
        )

    def extra_repr(self) -> str:
        """Features and the plan."""
        plan = ", ".join(f"to {most}: {name}" for most, name in self.plan)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dense kept={self.keeps_dense}, rows {plan}"
        )
