"""Which layers should choose TidalDecode's keys: exact answers for every pair of layers.

    python benchmarks/tidal_layers.py --model FOLDER --length 1024 --count 32 --threads 1

The paper calls the layer that corrects the choice a matter of the model and finds it by a sweep on
needle prompts; this is that sweep. Rows: layers before the first that chooses (``dense_layers``, at
least 1); columns: the layer that chooses anew (``correction``), 0 for none. Prompts are read once,
in full; every setting then writes the answers over a copy of the cache, token by token, as
``generate`` does. Beside them dense, the oracle and a window of as many keys. The model must answer
such questions densely, or no line means anything.
"""

import argparse
import copy
from contextlib import nullcontext
from typing import Any

import torch

from gossamer import OracleTopK, StreamingLLM, TidalDecode
from gossamer.core import Method
from gossamer.evaluate.long_context import Sample, samples
from gossamer.evaluate.long_context.scoring import padded
from gossamer.models import load_model


@torch.no_grad()
def read(model: Any, part: list[Sample]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Cache, mask and the first predicted token (B, 1) of prompts."""
    ids, mask = padded([s.ids for s in part], 0, model.device)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(ids, attention_mask=mask, position_ids=place, use_cache=True, logits_to_keep=1)
    return out.past_key_values, mask, out.logits[:, -1:].argmax(-1)


@torch.no_grad()
def right(model: Any, part: list[Sample], state: tuple[Any, torch.Tensor, torch.Tensor]) -> int:
    """Answers that greedy decoding writes token by token as they are."""
    cache, mask, token = copy.deepcopy(state)
    longest = max(len(s.answer_ids) for s in part)
    said = [token]
    for _ in range(longest - 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        place = mask.sum(1, keepdim=True) - 1
        token = model(
            token, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        ).logits.argmax(-1)
        said.append(token)
    rows = torch.cat(said, dim=1).tolist()
    return sum(
        tuple(row[: len(s.answer_ids)]) == s.answer_ids for row, s in zip(rows, part, strict=True)
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", default=["niah_single", "niah_multikey"])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--keys", type=int, help="keys read; a sixteenth of the length")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_model(given.model, dtype="float32", device=given.device)
    model: Any = loaded.model
    layers, keys = model.config.num_hidden_layers, given.keys or given.length // 16
    for task in given.tasks:
        asked = samples(task, loaded.tokenizer, length=given.length, count=given.count)
        parts = [asked[i : i + given.batch_size] for i in range(0, len(asked), given.batch_size)]
        states = [read(model, part) for part in parts]

        def score(method: Method | None, parts: Any = parts, states: Any = states) -> float:
            with nullcontext() if method is None else method.apply(model):
                good = sum(right(model, p, s) for p, s in zip(parts, states, strict=True))
            return good / given.count

        print(
            f"{task}, {given.length} tokens, {given.count} questions, {keys} keys: "
            f"dense {score(None):.3f}, oracle {score(OracleTopK(budget_tokens=keys)):.3f}, "
            f"window {score(StreamingLLM(recent=keys - 4)):.3f}",
            flush=True,
        )
        columns = [0, *range(2, layers)]
        print("dense_layers  correction " + " ".join(f"{c:5d}" for c in columns), flush=True)
        for dense in range(1, layers - 1):
            cells = [
                f"{score(TidalDecode(budget_tokens=keys, dense_layers=dense, correction=c)):5.3f}"
                if c == 0 or c > dense
                else "    -"
                for c in columns
            ]
            print(f"{dense:12d}             " + " ".join(cells), flush=True)


if __name__ == "__main__":
    main()
