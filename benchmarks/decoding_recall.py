"""What methods for decoding cost on questions about long contexts, by exact match.

    python benchmarks/decoding_recall.py --model FOLDER --length 1024 --count 16 --threads 1

Prints, for every method, the share of answers that match exactly when the question is seen with
the context, when it comes after the context was read (what a cache keeps then cannot depend on
it), and the seconds that answering took. Methods in text form may be given instead of the default
ones. The model must answer such questions densely, or no line means anything.
"""

import argparse
from contextlib import nullcontext

import torch

from gossamer.evaluate.long_context import generate, samples
from gossamer.methods import parse_method
from gossamer.models import Tokens, load_model


def defaults(length: int) -> list[str]:
    """Every method of decoding at a sixteenth of the keys, an eighth where they are evicted."""
    few, kept = length // 16, length // 8
    return [
        f"quest:budget_tokens={few}",
        f"quest:budget_tokens={few}:scorer=meanstd",
        f"double_sparsity:budget_tokens={few}:channel_sparsity=0.75",
        f"tidal_decode:budget_tokens={few}",
        f"hylra:budget_tokens={few}",
        f"snapkv:budget_tokens={kept}:window=32",
        f"snapkv:budget_tokens={kept}:window=32:allocation=heads",
        f"snapkv:budget_tokens={kept}:window=32:pool=1",
        f"oracle_top_k:budget_tokens={few}",
        f"streaming_llm:recent={kept - 4}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="niah_single")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_model(given.model, dtype="float32", device=given.device)
    ask = {"length": given.length, "count": given.count}
    asked = samples(given.task, loaded.tokenizer, **ask)
    other = samples(given.task, loaded.tokenizer, **ask, seed=1)
    shortest = min(len(s.ids) for s in other)
    data = Tokens.from_ids(torch.tensor([s.ids[:shortest] for s in other[:4]]))
    print(f"{given.task}, {given.length} tokens, {given.count} questions", flush=True)
    for text in ["dense", *(given.methods or defaults(given.length))]:
        method = None if text == "dense" else parse_method(text)
        work = nullcontext() if method is None else method.apply(loaded.model, data)
        with work:
            seen, unseen = (
                generate(
                    loaded.model,
                    loaded.tokenizer,
                    asked,
                    batch_size=given.batch_size,
                    question=question,
                )
                for question in ("seen", "unseen")
            )
        print(
            f"{text:60s} seen {seen.score:.3f}  unseen {unseen.score:.3f}  {seen.seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
