"""Measure nano: perplexity beside counting baselines, and samples of what it writes."""

import math

import numpy as np

if __package__:
    from gossamer.models.nano.windows import cut
else:  # run as a plain file, where this folder is on the path and gossamer may not be
    from windows import cut  # pyright: ignore[reportMissingImports]

PROMPTS = (
    "import numpy as np\n\n\ndef softmax(x",
    "class Stack:\n    def __init__(self",
    "from pathlib import Path\n\n\ndef read_lines(path",
)


def baselines(train: np.ndarray, val: np.ndarray, vocabulary: int) -> dict[str, float]:
    r"""Perplexity of counting: one token without context, and one token after another.

    Unigram: add-one counts. Bigram: Witten-Bell, which trusts a context by how seldom it brings
    something new,

    .. math:: p(b|a) = \frac{c(ab) + t(a)\,p(b)}{c(a) + t(a)},

    with t(a) the number of distinct followers of a. Both are scored on the same targets as the
    model: every token of ``val`` but the first.
    """
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()
    pairs = np.bincount(
        train[:-1].astype(np.int64) * vocabulary + train[1:], minlength=vocabulary * vocabulary
    ).reshape(vocabulary, vocabulary)
    followers = (pairs > 0).sum(axis=1)
    # A context never seen in training carries no trust: the unigram answers alone.
    trust = np.where(followers > 0, followers, 1)
    before, after = val[:-1].astype(np.int64), val[1:].astype(np.int64)
    joint = pairs[before, after] + trust[before] * unigram[after]
    bigram = joint / (pairs.sum(axis=1) + trust)[before]
    return {
        "unigram": float(np.exp(-np.log(unigram[after]).mean())),
        "bigram": float(np.exp(-np.log(bigram).mean())),
    }


# --- model -------------------------------------------------------------------------------------


def evaluate(model, val, context: int, batch: int, lengths: list[int]) -> dict[str, float]:
    """Perplexity per token and bits per byte over a token stream, each target predicted once.

    Windows do not overlap, so a window's first targets are predicted from little context.
    """
    import torch
    from torch.nn import functional

    device = next(model.parameters()).device
    val = torch.from_numpy(val.astype(np.int32)).to(device)
    sizes = torch.tensor(lengths, device=device)
    loss, count, size = 0.0, 0, 0
    whole = (len(val) - 1) // context * context
    blocks = [
        torch.arange(start, min(start + batch * context, whole), context, device=device)
        for start in range(0, whole, batch * context)
    ]
    with torch.inference_mode():
        rest = [(torch.tensor([whole], device=device), len(val) - 1 - whole)]
        for starts, length in [(block, context) for block in blocks] + rest:
            if length:
                inputs, targets = cut(val, starts, length)
                logits = model(input_ids=inputs, use_cache=False).logits.float()
                loss += float(
                    functional.cross_entropy(
                        logits.flatten(0, 1), targets.flatten(), reduction="sum"
                    ).double()
                )
                count += targets.numel()
                size += int(sizes[targets].sum())
    return {
        "perplexity": math.exp(loss / count),
        "bits_per_byte": loss / math.log(2) / size,
        "tokens": count,
        "bytes": size,
    }


def samples(model, tokenizer_json: bytes, length: int = 120) -> list[dict]:
    """Continue each prompt once greedily and once at temperature 0.8."""
    import tokenizers
    import torch

    bpe = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    out = []
    for prompt in PROMPTS:
        start = torch.tensor([bpe.encode(prompt).ids], device=model.device)
        for temperature in (0.0, 0.8):
            torch.manual_seed(0)
            how = (
                {"do_sample": True, "temperature": temperature}
                if temperature
                else {"do_sample": False}
            )
            made = model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=length, **how
            )
            text = bpe.decode(made[0].tolist(), skip_special_tokens=True)
            out.append({"temperature": temperature, "prompt": prompt, "text": text})
    return out
