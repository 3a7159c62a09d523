"""Soups against their members, greedy soups, random masks and longer retraining, on one model.

For every seed: one phase at a sparsity, copies that differ in the order of data, losses on windows
that no copy trained on. ``--threads 1`` is what the committed figures use.

    python benchmarks/soups.py --model nano --sparsity 0.5 --copies 3 --steps 20
    python benchmarks/soups.py --model FOLDER --data TEXT --length 256
"""

import argparse
import time
from dataclasses import replace

import torch

from gossamer.methods.weights.sparse_soups import SparseSoups
from gossamer.models import Tokens, load_model, read_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", help="training text; without it the packaged one")
    parser.add_argument("--base", default="magnitude")
    parser.add_argument("--pattern", default="model")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=112, help="windows, one in eight held out")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model)
    documents = read_documents(options.data, "calibration")
    soup = SparseSoups(
        base=options.base,
        pattern=options.pattern,
        sparsity=options.sparsity,
        phases=1,
        copies=options.copies,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
    )
    longer = replace(soup, copies=2, steps=options.copies * options.steps)
    chance = replace(soup, base="random", copies=2)
    print(f"{soup.to_dict()}\nloss in nats per token on the windows held out")
    print("seed   soup   copies   best   greedy   longer   random masks   seconds")
    for seed in range(options.seeds):
        began = time.monotonic()
        tokens = Tokens.from_documents(
            documents, tokenizer, length=options.length, samples=options.samples, seed=seed
        )
        rows = []
        for method in (soup, replace(soup, soup="greedy"), longer, chance):
            with replace(method, seed=10 * seed).apply(model, tokens) as applied:
                rows.append(applied.facts["phases"][0])
        own, best, long, noise = rows
        members = own["members"]
        print(
            f"{seed:4} {own['soup']:7.4f} {sum(members) / len(members):7.4f} {min(members):7.4f} "
            f"{best['soup']:7.4f} {min(long['members']):7.4f} {noise['soup']:8.4f} "
            f"{time.monotonic() - began:12.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
