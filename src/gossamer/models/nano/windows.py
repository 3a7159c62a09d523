"""Windows of a token stream for training: every token once per epoch, in a fresh order."""


class Windows:
    """Every token once per epoch, in windows of a fresh phase and order.

    The batch of a step depends only on the seed and the step, so a resumed run sees the data an
    uninterrupted one would have seen.

    Parameters
    ----------
    tokens : int tensor of shape (N,).
    context : tokens predicted per window.
    batch : windows per step.
    seed : fixes phase and order of every epoch.
    """

    def __init__(self, tokens, context: int, batch: int, seed: int):
        import torch

        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.per_epoch = (len(tokens) - 1 - context) // context // batch
        if self.per_epoch < 1:
            raise ValueError(
                f"{len(tokens)} tokens do not fill one batch of {batch} windows of {context}: "
                "use a larger corpus, or a smaller --batch or --context"
            )
        self._epoch, self._starts = -1, torch.zeros(0, dtype=torch.long)

    def at(self, step: int):
        """Inputs and targets of a step, each of shape (batch, context)."""
        import torch

        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            phase = int(torch.randint(self.context, (), generator=generator))
            count = (len(self.tokens) - 1 - phase) // self.context
            starts = torch.randperm(count, generator=generator) * self.context + phase
            self._epoch, self._starts = epoch, starts.to(self.tokens.device)
        start = self._starts[position * self.batch : (position + 1) * self.batch]
        return cut(self.tokens, start, self.context)


def cut(tokens, starts, context: int):
    """Windows of inputs and next-token targets at given starts."""
    import torch

    index = starts[:, None] + torch.arange(context + 1, device=starts.device)
    window = tokens[index].long()
    return window[:, :-1], window[:, 1:]
