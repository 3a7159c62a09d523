"""Prefill and decode by two methods: each phase is what it would be alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.claims.attention.controls import LENGTH, window_of
from gossamer.claims.base import Claim, Figures, Verdict
from gossamer.claims.lm import nano
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.oracle_top_k import OracleTopK
from gossamer.methods.attention.streaming_llm import StreamingLLM

__all__ = ["CLAIMS"]

PROMPT = 224


@torch.no_grad()
def logits(method: AttentionMethod, seed: int) -> tuple[Tensor, Tensor]:
    """Of the prompt, and of the tokens that follow it one by one."""
    model, ids = nano().model, window_of(seed).input_ids[:, : PROMPT + 8]
    with method.apply(model):
        out = model(ids[:, :PROMPT], use_cache=True)
        prompt, cache, steps = out.logits, out.past_key_values, []
        for at in range(PROMPT, ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    return prompt, torch.cat(steps, dim=1)


def run(seed: int) -> Figures:
    first = OracleTopK(sparsity=0.8, length=LENGTH)
    second = StreamingLLM(recent=64, length=LENGTH)
    both, alone = logits(first + second, seed), logits(first, seed)
    window = logits(second, seed)
    return {
        "prompt": float((both[0] - alone[0]).abs().max()),
        "steps": float((both[1] - alone[1]).abs().max()),
        "window": float((both[0] - window[0]).abs().max()),
    }


def check(figures: Sequence[Figures]) -> Verdict:
    same = all(f["prompt"] == 0.0 for f in figures)
    differs = all(f["steps"] > 1e-3 and f["window"] > 1e-3 for f in figures)
    return Verdict.HOLDS if same and differs else Verdict.FAILS


CLAIMS = (
    Claim(
        name="phases are kept apart",
        sentence="A prompt read by one method and decoded by another gives, for the prompt, "
        "exactly what the first alone gives, and other tokens where decoding differs.",
        paper="no paper: a combination users ask for",
        experiment=f"the packaged model, {PROMPT} held-out tokens by oracle top-k at 80 %, eight "
        "more by a window of 64",
        run=run,
        check=check,
        ours="largest logit difference: prompt {prompt:.1e}, steps {steps:.2f}, against the "
        "window's prompt {window:.2f}",
    ),
)
