"""Host: a frozen network at work behind and before an adapter.

Hooks on the network and on its head do it; no parameter, buffer or method of it changes.
Shapes: B samples, T tokens, F features, S source classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.methods.training.reprogrammed.adapters import Adapter, SoftPrompt
from gossamer.methods.training.reprogrammed.examples import Examples, is_text
from gossamer.models.capture import evaluating
from gossamer.models.fit import meeting

__all__ = ["Host", "call", "find_head", "soft_prompt"]


def call(model: nn.Module, values: dict[str, Tensor]) -> Any:
    """What a network gives for some inputs."""
    return model(values["x"]) if "x" in values else model(**values)


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise GossamerError(
            f"the network gives a {type(output).__name__} without logits; give a classifier or a "
            "language model"
        )
    return found


@torch.no_grad()
def find_head(model: nn.Module, examples: Examples) -> str:
    """Path of the layer whose output is the network's: its head.

    Raises
    ------
    GossamerError
        If no linear layer's output is.
    """
    if is_text(model):
        own: Any = model
        head = own.get_output_embeddings()
        return next(name for name, module in model.named_modules() if module is head)
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.detach()

        return hook

    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in linears]
    try:
        device = next(model.parameters()).device
        values, _ = next(examples.at(torch.arange(1)).batches(1, device))
        with evaluating(model), meeting(model, values):
            logits = _logits(call(model, values))
    finally:
        for handle in handles:
            handle.remove()
    for name in reversed(linears):
        if name in seen and seen[name].shape == logits.shape and torch.equal(seen[name], logits):
            return name
    raise GossamerError(
        f"no linear layer of {type(model).__name__} gives its logits, so there are no features to "
        "probe; give a network that ends in a linear head"
    )


class Host:
    """A network with an adapter; :meth:`install` makes the network itself a classifier.

    Parameters
    ----------
    head : path of the layer that gives the network's logits.
    """

    def __init__(self, model: nn.Module, head: str, adapter: Adapter) -> None:
        self.model = model
        self.head = head
        self.adapter = adapter
        self.text = is_text(model)
        self._handles: list[Any] = []
        self._last: Tensor | None = None
        self._features: Tensor | None = None
        self._raw = False

    def install(self) -> None:
        """Hook the network; undone by :meth:`remove`."""
        head = self.model.get_submodule(self.head)
        self._handles += [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            head.register_forward_pre_hook(self._before_head),
            self.model.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def run(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The head's input (B, F) and output (B, S), of the network behind the adapter."""
        self._raw = True
        try:
            with meeting(self.model, values, "a batch"):
                return call(self.model, values)
        finally:
            self._raw = False
            self._last = self._features = None

    # -- hooks ------------------------------------------------------------------------------

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._features = None
        kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
        if self.text:
            return (), self._text(args, kwargs)
        if args:
            return (self.adapter.enter("x", args[0]), *args[1:]), kwargs
        name = "pixel_values" if "pixel_values" in kwargs else next(iter(kwargs))
        return args, {**kwargs, name: self.adapter.enter(name, kwargs[name])}

    def _text(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("past_key_values") is not None:
            raise GossamerError(
                "a reprogrammed language model classifies whole texts and does not generate; "
                "call restore() first"
            )
        kwargs.pop("past_key_values", None)
        ids = args[0] if args else kwargs.pop("input_ids", None)
        model: Any = self.model
        embeds = kwargs.pop("inputs_embeds", None)
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        longer = self.adapter.enter("inputs_embeds", embeds)
        added = longer.shape[1] - embeds.shape[1]
        if added:
            mask = torch.cat([mask.new_ones(len(mask), added), mask], 1)
            if (positions := kwargs.get("position_ids")) is not None:
                front = torch.arange(added, device=positions.device).expand(len(positions), -1)
                kwargs["position_ids"] = torch.cat([front, positions + added], 1)
        places = torch.arange(longer.shape[1], device=mask.device)
        self._last = (mask.bool() * places).argmax(1)
        return {**kwargs, "inputs_embeds": longer, "attention_mask": mask, "use_cache": False}

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features = args[0]
        if self.text:
            assert self._last is not None
            # The last real token of every text is all that is read.
            rows = torch.arange(len(features), device=features.device)
            features = features[rows, self._last][:, None]
        self._features = features
        return (features, *args[1:])

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        logits = _logits(output)
        features = self._features
        if features is None:
            raise GossamerError(f"the network did not use its head {self.head}")
        if self.text:
            features, logits = features[:, 0], logits[:, 0]
        self._features = self._last = None
        if self._raw:
            return features, logits
        found = self.adapter.leave(features, logits)
        if isinstance(output, Tensor):
            return found
        output.logits = found
        return output


def soft_prompt(model: nn.Module, classes: int, length: int, seed: int) -> SoftPrompt:
    """A soft prompt that begins as the embeddings of words drawn at random."""
    own: Any = model
    table = own.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(table.num_embeddings, (1, length), generator=generator)
    device = next(model.parameters()).device
    with torch.no_grad():
        return SoftPrompt(classes, table(ids.to(device))[0])
