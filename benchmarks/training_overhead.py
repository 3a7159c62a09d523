"""What holding masks costs: ``sparsifier.step()`` and masked gradients, as a share of a step.

    python benchmarks/training_overhead.py [--model nano] [--threads 1] [--batch 8] [--length 256]
        [--rounds 5] [--sparsity 0.9]

One figure is promised: ``sparsifier.step()`` takes at most 3 % of a training step (forward,
backward, AdamW) without changes of the masks. Updates with and without a sparsifier alternate;
printed are medians: the plain update, ``step()`` alone, its share, the whole sparse update, one
change of RigL's masks, and the bytes held beside model and optimizer.
"""

import argparse
import statistics
import time

import torch

from gossamer.methods.training.rigl import RigL
from gossamer.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = load_model(given.model).model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(3, model.config.vocab_size, (given.batch, given.length))

    def update() -> float:
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    plain: list[float] = []
    masked: list[float] = []
    holding: list[float] = []
    changing: list[float] = []
    memory: dict[str, int] = {}
    for turn in range(given.rounds + 1):
        update()
        optimizer.zero_grad()
        plain.append(update())
        optimizer.zero_grad()
        method = RigL(sparsity=given.sparsity, steps=10_000, every=3)
        sparsifier = method.attach(model, optimizer)
        for step in range(3):
            took = update()
            start = time.perf_counter()
            sparsifier.step()
            spent = time.perf_counter() - start
            optimizer.zero_grad()
            if step == 1:
                masked.append(took + spent)
                holding.append(spent)
            elif step == 2:
                changing.append(took + spent)
        memory = sparsifier.memory()
        sparsifier.remove()
        if turn == 0:  # not counted
            for figures in (plain, masked, holding, changing):
                figures.clear()
    a, b, c, d = (1e3 * statistics.median(x) for x in (plain, masked, holding, changing))
    weights = sum(layer.size for layer in sparsifier.layers)
    print(f"{given.model}: {weights:,} weights, {given.batch} x {given.length} tokens")
    print(f"plain update       {a:9.1f} ms")
    print(f"sparsifier.step()  {c:9.1f} ms, {c / a:.1%} of it (promised: at most 3 %)")
    print(f"sparse update      {b:9.1f} ms, {b / a:.3f} of the plain one, gradients masked")
    print(f"change of masks    {d:9.1f} ms, forward and backward included")
    print("beside model and optimizer: " + ", ".join(f"{k} {v:,} B" for k, v in memory.items()))


if __name__ == "__main__":
    main()
