"""Optimizer of a dictionary: Adam with clipping on float32 masters, atoms kept at norm 1.

On CPUs it is torch's fused Adam; on GPUs one Triton pass a matrix does Adam, the projection, the
norm and the half-precision copy that computes, which reads and writes every number once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gossamer.kernels.sparse_code.adam import adam_rows, fits, square_rows

__all__ = ["DictionaryAdam"]


class DictionaryAdam:
    """Adam (Kingma & Ba 2015) over named parameters.

    Parameters
    ----------
    parameters : name to parameter. Matrices are turned to ``compute``; their float32 masters are
        kept here.
    unit : names of matrices whose rows keep norm 1; growth along a row, which would be undone
        and yet fill the moments, is taken out of its gradient.
    clip : largest norm of the whole gradient.
    compute : dtype of the matrices that compute; float32 keeps one copy of everything.
    total : squared norm of the whole gradient, given those of the parameters by name, where
        other processes hold parts of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        unit: tuple[str, ...] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        clip: float = 1.0,
        compute: torch.dtype = torch.float32,
        total: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> None:
        self.total = total
        self.parameters, self.unit = dict(parameters), unit
        self.parameters, self.unit, self.clip = dict(parameters), unit, clip
        self.betas, self.eps, self.steps = betas, eps, 0
        self.masters: dict[str, Tensor] = {}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in self.parameters.items():
            master: Tensor = parameter
            if parameter.dim() == 2 and parameter.dtype != compute:
                master = nn.Parameter(parameter.detach().clone())
                parameter.data = parameter.detach().to(compute)
            self.masters[name] = master
            plain = master.detach()
            self.moments[name] = (torch.zeros_like(plain), torch.zeros_like(plain))
        self.fused = all(fits(_rows(master)) for master in self.masters.values())
        self._adam = torch.optim.Adam(self.masters.values(), eps=eps, betas=betas, fused=True)
        for name, master in self.masters.items():
            mean, square = self.moments[name]
            step = torch.zeros((), device=master.device)
            self._adam.state[master] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients at hand; those of ``unit`` matrices are projected."""
        self.steps += 1
        if self.fused:
            self._step_rows(lr)
        else:
            self._step_torch(lr)

    def _step_torch(self, lr: float) -> None:
        for name, parameter in self.parameters.items():
            master, grad = self.masters[name], parameter.grad
            if grad is not None and name in self.unit:
                grad = grad.to(master.dtype)
                grad -= (grad * master).sum(1, keepdim=True) * master
            if master is not parameter:
                master.grad = None if grad is None else grad.to(master.dtype)
        if self.total is None:
            nn.utils.clip_grad_norm_(self.masters.values(), self.clip)
        else:
            grads = {n: m.grad for n, m in self.masters.items() if m.grad is not None}
            clip = self._clip({name: grad.square().sum() for name, grad in grads.items()})
            for grad in grads.values():
                grad.mul_(clip)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        for name in self.unit:
            self.masters[name].div_(
                torch.linalg.vector_norm(self.masters[name], dim=1, keepdim=True)
            )
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _clip(self, squares: Mapping[str, Tensor]) -> Tensor:
        """(1,), what the gradient is multiplied by, given squared norms by name."""
        if self.total is None:
            total = torch.stack(list(squares.values())).sum()
        else:
            total = self.total(squares)
        return (self.clip / (total.sqrt() + 1e-6)).clamp_max(1.0).reshape(1)

    def _step_rows(self, lr: float) -> None:
        """The same update in passes over whole rows; no value is read back by the host."""
        matrices: list[tuple[str, Tensor, Tensor]] = []
        squares: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                grad, master = _rows(parameter.grad), _rows(self.masters[name].detach())
                assert grad.is_contiguous()
                assert master.is_contiguous()
                matrices.append((name, grad, master))
                squares[name] = square_rows(grad, master, unit=name in self.unit).sum()
        clip = self._clip(squares)
        for name, grad, master in matrices:
            mean, square = self.moments[name]
            adam_rows(
                grad,
                master,
                _rows(mean),
                _rows(square),
                _rows(self.parameters[name].detach()),
                clip,
                step=self.steps,
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                unit=name in self.unit,
            )

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        found = {"steps": torch.tensor(self.steps)}
        for name, master in self.masters.items():
            mean, square = self.moments[name]
            found |= {f"master.{name}": master.detach(), f"mean.{name}": mean}
            found[f"square.{name}"] = square
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        self.steps = int(state["steps"])
        for name, master in self.masters.items():
            mean, square = self.moments[name]
            master.copy_(state[f"master.{name}"])
            mean.copy_(state[f"mean.{name}"])
            square.copy_(state[f"square.{name}"])
            self._adam.state[master]["step"].fill_(float(self.steps))
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)

    @torch.no_grad()
    def release(self) -> None:
        """Put the float32 masters in the parameters' place; the optimizer ends here."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.data = self.masters[name].detach()
            parameter.grad = None


def _rows(tensor: Tensor) -> Tensor:
    """As rows in the order of memory: latent by latent for an encoder that is stored so."""
    if tensor.dim() == 2 and not tensor.is_contiguous():
        return tensor.T
    return tensor if tensor.dim() == 2 else _flat(tensor)


def _flat(vector: Tensor) -> Tensor:
    """A vector as rows of at most 1024 where its length allows."""
    wide = next(w for w in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if vector.numel() % w == 0)
    return vector.view(-1, wide)
