"""A prompt that makes a model retrieve, without words: keys and values of random tokens."""

import torch

from gossamer.models import Tokens

__all__ = ["retrieval_prompt"]


def retrieval_prompt(vocabulary: int, length: int, seed: int = 0) -> Tokens:
    """Pairs of a key and its value, then some of them asked again: (1, length) token ids.

    Three quarters of the prompt are pairs of 4 random tokens, 2 for the key and 2 for the value;
    the rest repeats pairs from anywhere in it. A model that looks up, or copies what followed an
    earlier token, attends far back.

    Parameters
    ----------
    vocabulary : ids are drawn from 3 to vocabulary - 1, so that special tokens stay out.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = max(1, -(-3 * length // 16))
    low = min(3, vocabulary - 1)
    facts = torch.randint(low, vocabulary, (pairs, 4), generator=generator)
    asked = torch.randint(0, pairs, (pairs,), generator=generator)
    return Tokens.from_ids(torch.cat([facts, facts[asked]]).flatten()[None, :length])
