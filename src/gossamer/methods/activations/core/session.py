"""Passes of a model whose answers are decoded with core neurons.

The model that owns the blocks tells what a pass is: a prompt (observed, dense), a token to
decode (run on small matrices), or a text scored in one pass (its first tokens are the prompt,
the others see core neurons only). The matrices of the chosen layers ask here what to do.
Shapes: B rows, T tokens, N = B * T, F neurons.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from gossamer.core import GossamerError
from gossamer.methods.activations.core.layers import Feedforward
from gossamer.methods.activations.core.memory import Memory, Mode, Plan
from gossamer.methods.activations.positions import logical_positions
from gossamer.models import Inputs, Progress, Tokens
from gossamer.models.capture import evaluating

__all__ = ["Session", "swap"]


class _Swap:
    """Handle of a replaced forward; ``remove`` puts back what was there."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.before = module, vars(module).get("forward")
        vars(module)["forward"] = forward

    def remove(self) -> None:
        if self.before is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.before


def swap(module: nn.Module, forward: Callable[..., Any]) -> _Swap:
    """Replace a module's forward until the handle is removed."""
    return _Swap(module, forward)


class Session:
    """The hooks of one method on one model, and the memories of the caches it has filled.

    Parameters
    ----------
    prompt : real tokens at the start of a text scored in one pass that count as its prompt.
    """

    def __init__(self, model: nn.Module, base: str, plan: Plan, prompt: int) -> None:
        self.model, self.plan, self.prompt = model, plan, prompt
        self.base = model.get_submodule(base)
        self.memories: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()
        self.last: Memory | None = None
        self.unknown = 0
        self.collect: Callable[[Memory], None] | None = None
        self._names = tuple(signature(self.base.forward).parameters)
        self._inner = False
        self._handles: list[Any] = []
        self._end()

    def attach(self) -> None:
        """Put the hooks in place; :meth:`remove` takes them away, also after a failure here."""
        self._handles += [
            self.base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.register_forward_hook(self._leave, always_call=True),
        ]
        for layer in self.plan.layers.values():
            module = self.model.get_submodule(layer.name)
            if layer.stacked:
                _check_stack(module)
                self._swap(module, partial(self._stack, layer, module))
                continue
            self._swap(module, partial(self._down, layer, module, module.forward))
            for site in layer.readers:
                reader = self.model.get_submodule(site.module)
                self._swap(reader, partial(self._read, layer, site.module, reader.forward))

    @torch.no_grad()
    def read(
        self,
        data: Tokens | Inputs,
        collect: Callable[[Memory], None],
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        """Read data as prompts, densely, and hand over the memory of every batch."""
        device = next(self.base.parameters()).device
        cached = {"use_cache": False} if "use_cache" in self._names else {}
        done = 0
        self.collect = collect
        try:
            with evaluating(self.model):
                for batch in data.batches(batch_size, device):
                    self.base(**{k: v for k, v in batch.items() if k in self._names}, **cached)
                    done += len(next(iter(batch.values())))
                    if progress is not None:
                        progress(done, len(data), "reading prompts")
        finally:
            self.collect = None

    def _swap(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._handles.append(swap(module, forward))

    def remove(self) -> None:
        """Take every hook away. A second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    # -- what a pass is ------------------------------------------------------------------------

    def _end(self) -> None:
        self.mode: Mode = "off"
        self.memory: Memory | None = None
        self.cache: Any = None
        self.shape = (0, 0)
        self.voting: Tensor | None = None
        self.limited: Tensor | None = None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inner:
            return
        self._end()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = next(
            (v for k in ("input_ids", "inputs_embeds") if (v := given.get(k)) is not None), None
        )
        if tokens is None:
            return
        rows, length = self.shape = (tokens.shape[0], tokens.shape[1])
        cache = self.cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        known = None if cache is None else self.memories.get(cache)
        if length == 1 and past:
            if known is None or known.rows != rows:
                self.unknown += 1
                return
            self.memory, self.mode = known, known.next_mode(self.model)
            self.voting = torch.ones(rows, dtype=torch.bool, device=tokens.device)
            if self.mode == "listen":
                self.voting, self.limited = known.listening, ~known.listening
            return
        if known is None or not past or known.rows != rows:
            known = Memory(self.plan, rows, tokens.device)
        self.memory = known
        real = torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
        if mask is not None and mask.shape[1] >= past + length:
            real = mask[:, past : past + length].to(tokens.device) != 0
        if past or cache is not None or given.get("use_cache") or self.collect is not None:
            self.mode, self.voting, known.stale = "prompt", real.flatten(), True
            return
        place = logical_positions(length, 0, mask, None, tokens.device).to(tokens.device)
        early = (place < self.prompt).expand(rows, length)
        self.voting, self.limited = (real & early).flatten(), (real & ~early).flatten()
        self.mode = "scored"
        clusters = self.plan.clusters
        if clusters is not None and len(clusters.centroids) > 1 and bool(self.limited.any()):
            self._look_ahead(module, args, kwargs)

    def shrink(self, places: Tensor) -> None:
        """Tokens left the running prompt: from here on it holds those at (B, T') places."""
        if self.mode == "off":
            return
        for name in ("voting", "limited"):
            flags = getattr(self, name)
            if flags is not None:
                setattr(self, name, flags.view(self.shape).gather(1, places).flatten())
        self.shape = (self.shape[0], places.shape[1])

    @torch.no_grad()
    def _look_ahead(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A late layer tells the cluster that early layers need: read the prompt first."""
        limited, self.limited = self.limited, None
        self._inner, self.mode = True, "prompt"
        try:
            module(*args, **{**kwargs, "use_cache": False})
        finally:
            self._inner = False
        assert self.voting is not None
        # The prompt has voted; read again, it must not vote twice.
        self.mode, self.limited, self.voting = "scored", limited, torch.zeros_like(self.voting)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inner:
            return
        memory, mode = self.memory, self.mode
        if memory is not None and output is not None:
            self.last = memory
            if mode in ("probe", "listen"):
                memory.after(mode, self.model)
            cache = (
                self.cache if self.cache is not None else getattr(output, "past_key_values", None)
            )
            if mode == "prompt" and cache is not None:
                self.memories[cache] = memory
            if mode == "prompt" and self.collect is not None:
                self.collect(memory)
        self._end()

    # -- what the matrices do ------------------------------------------------------------------

    def _read(self, layer: Feedforward, path: str, own: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Forward of a gate or up matrix."""
        slices = self._slices(layer)
        return own(x) if slices is None else F.linear(x, *slices[0].readers[path])

    def _down(
        self, layer: Feedforward, module: nn.Module, own: Callable[..., Tensor], x: Tensor
    ) -> Tensor:
        """Forward of a down matrix."""
        slices = self._slices(layer)
        if slices is not None:
            small = slices[0]
            if small.inside is not None:
                x = x * small.inside.view(self.shape[0], *[1] * (x.dim() - 2), -1)
            return F.linear(x, small.down, small.bias)
        if self.mode in ("off", "decode"):
            return own(x)
        if x.shape[:-1].numel() != self.shape[0] * self.shape[1]:
            raise GossamerError(
                f"{layer.name} sees {x.shape[:-1].numel()} rows of a pass with "
                f"{self.shape[0] * self.shape[1]} tokens, so prompts cannot be told apart; "
                "leave its block out of the layers"
            )
        flat = x.reshape(-1, x.shape[-1])
        token = torch.arange(len(flat), device=flat.device)
        return own(self._see(layer, 0, flat, token).view(x.shape))

    def _stack(
        self, layer: Feedforward, module: Any, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Forward of a stack of experts: its plain definition, expert by expert."""
        slices = self._slices(layer)
        out = torch.zeros_like(hidden, dtype=torch.float32)
        for e in index.unique().tolist():
            token, slot = torch.where(index == e)
            if slices is None:
                inner = module._apply_gate(F.linear(hidden[token], module.gate_up_proj[e]))
                if self.mode not in ("off", "decode"):
                    inner = self._see(layer, e, inner, token)
                part = F.linear(inner, module.down_proj[e])
            else:
                small = slices[e]
                inner = module._apply_gate(F.linear(hidden[token], *small.readers[layer.name]))
                if small.inside is not None:
                    inner = inner * small.inside[token // self.shape[1]]
                part = F.linear(inner, small.down)
            out.index_add_(0, token, (part * weights[token, slot, None]).float())
        return out.to(hidden.dtype)

    def _slices(self, layer: Feedforward) -> Any:
        if self.mode != "decode" or self.memory is None:
            return None
        return self.memory.slices[layer.name]

    def _see(self, layer: Feedforward, e: int, flat: Tensor, token: Tensor) -> Tensor:
        """Let the voting tokens vote; leave the limited ones their core neurons only."""
        memory = self.memory
        assert memory is not None
        assert self.voting is not None
        row = token // self.shape[1]
        voting = self.voting[token]
        seen, norm = flat.detach(), self.plan.norms[layer.name][e].to(flat.device)
        for b in row[voting].unique().tolist():
            rows = seen[voting & (row == b)]
            memory.tallies[layer.name].add(b, e, rows, self.plan.ranking, self.plan.alpha, norm)
        if self.limited is None or not bool(self.limited.any()):
            return flat
        core = memory.choice(layer.name) if self.mode == "scored" else memory.cores[layer.name]
        if self.mode == "scored":
            memory.cores[layer.name] = core
        return flat.masked_fill(self.limited[token][:, None] & ~core[row, e], 0)


def _check_stack(module: Any) -> None:
    if module.has_bias or module.is_transposed or not module.has_gate:
        raise GossamerError(
            f"experts of {type(module).__name__} have biases, transposed weights or no gate; "
            "their neurons cannot be gathered: leave their blocks out of the layers"
        )
