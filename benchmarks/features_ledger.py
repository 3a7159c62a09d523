"""Sparse autoencoders at equal tokens, method by method, on a model and on the toy beds.

    python benchmarks/features_ledger.py --model nano
    python benchmarks/features_ledger.py --model MODEL --data TEXT --tokens 300000 --seeds 0 1 2
    python benchmarks/features_ledger.py --toy

On a model: every method trains a dictionary of the middle block's output on the same rows in the
same order, and is measured on held-out text: explained variance about the mean, L0, loss recovered
(zero and mean ablation), dead latents. On the toy beds: explained variance, L0, dead latents, true
atoms found (MCC), atoms with an antiparallel twin. Every figure is the mean over seeds with the
range of the seeds. Methods whose sparsity is learned do not hit k exactly: read EV beside L0.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gossamer.methods.features.abstopk import AbsTopK
from gossamer.methods.features.base import DictionaryMethod
from gossamer.methods.features.batch_topk_sae import BatchTopKSAE
from gossamer.methods.features.gated_sae import GatedSAE
from gossamer.methods.features.gradient_sae import GradientSAE
from gossamer.methods.features.jumprelu_sae import JumpReLUSAE
from gossamer.methods.features.matryoshka_sae import MatryoshkaSAE
from gossamer.methods.features.measure import antiparallel, matched_cosine, score_rows
from gossamer.methods.features.mutual_choice import MutualChoice
from gossamer.methods.features.objective import Layout
from gossamer.methods.features.readers import GradientReader
from gossamer.methods.features.relu_sae import ReLUSAE
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.splicing import loss_recovered
from gossamer.methods.features.top_afa import TopAFA
from gossamer.methods.features.topk_sae import TopKSAE
from gossamer.methods.features.toy import Superposition
from gossamer.methods.features.training import train
from gossamer.models import Tokens, as_tokens, find_sites, load_model, read_documents

Row = dict[str, float]


def methods(k: int, l1: float, gated: float) -> dict[str, DictionaryMethod]:
    """Every method at a mean of k latents, as far as it takes a count."""
    return {
        "relu_sae": ReLUSAE(coefficient=l1),
        "gated_sae": GatedSAE(coefficient=gated),
        "jumprelu_sae": JumpReLUSAE(target_l0=float(k)),
        "topk_sae": TopKSAE(k=k),
        "topk_sae:multi": TopKSAE(k=k, multi=True),
        "batch_topk_sae": BatchTopKSAE(k=k),
        "matryoshka_sae": MatryoshkaSAE(k=k),
        "mutual_choice:choice=mutual": MutualChoice(k=k, choice="mutual"),
        "mutual_choice:choice=feature": MutualChoice(k=k, choice="feature"),
        "abstopk": AbsTopK(k=k),
        "top_afa": TopAFA(),
        "gradient_sae": GradientSAE(k=k),
    }


def shuffled(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches in a new order every pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def ledger(
    measured: Callable[[DictionaryMethod, int], Row],
    chosen: dict[str, DictionaryMethod],
    seeds: list[int],
) -> dict[str, list[Row]]:
    """Print a line a method as it is done; the rows by method and seed."""
    found: dict[str, list[Row]] = {}
    for name, method in chosen.items():
        start = time.perf_counter()
        found[name] = [measured(replace(method, seed=seed), seed) for seed in seeds]
        if len(found) == 1:
            print(f"{'method':<30}" + "".join(f"{n:>28}" for n in found[name][0]) + "  seconds")
        cells = []
        for figure in found[name][0]:
            values = [row[figure] for row in found[name]]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})")
        seconds = (time.perf_counter() - start) / len(seeds)
        print(f"{name:<30}" + "".join(f"{c:>28}" for c in cells) + f"  {seconds:7.1f}", flush=True)
    return found


def on_model(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The ledger on a model's middle block."""
    loaded = load_model(args.model, dtype="float32")
    model = loaded.model
    blocks = find_sites(model).blocks
    hook = args.hook or blocks[len(blocks) // 2]
    texts = read_documents(args.data, "calibration")
    held = texts[-max(1, len(texts) // 10) :] if args.data else read_documents(None, "heldout")
    texts = texts[: -max(1, len(texts) // 10)] if args.data and len(texts) > 1 else texts
    samples = args.tokens // args.length
    data = as_tokens(texts, model, samples=samples, length=args.length, tokenizer=loaded.tokenizer)
    test = Tokens.from_documents(held, loaded.tokenizer, length=args.length).slice(args.windows)
    source = ActivationSource(
        model, hook, data, reader=GradientReader(hook), resident_bytes=1 << 34
    )
    rows = source.resident()
    assert rows is not None
    wide = rows.shape[1] // 2
    own = ActivationSource(model, hook, test, sink_multiple=None)
    test_rows = torch.cat(list(own.one_pass()))
    norms = torch.linalg.vector_norm(test_rows, dim=1)
    if source.sink_norm is not None:
        test_rows = test_rows[norms <= source.sink_norm]
    width = args.expansion * wide
    print(
        f"# {args.model} {hook}: {len(rows)} rows, "
        f"{args.passes} passes, width {width}, k {args.k}; held out: {len(test_rows)} rows"
    )

    def measured(method: DictionaryMethod, seed: int) -> Row:
        steps = args.passes * len(rows) // args.batch
        full = replace(method, width=width, tokens=steps * args.batch, lr=method.lr or args.lr)
        made = train(
            shuffled(rows, args.batch, seed),
            width=width,
            rule=full.rule(),
            recipe=full.recipe(steps, args.batch),
            layout=Layout(wide, 0, wide),
        )
        made.metadata["sink_norm"] = source.sink_norm
        score = score_rows(made, test_rows.split(4096))
        zero = loss_recovered(model, test, made, hook)
        mean = loss_recovered(model, test, made, hook, ablation="mean")
        return {
            "EV": score.ev,
            "L0": score.l0,
            "CE rec. (zero)": zero.recovered,
            "CE rec. (mean)": mean.recovered,
            "CE rise, nats": zero.spliced - zero.clean,
            "dead": score.dead,
        }

    return ledger(measured, _chosen(args, args.k), args.seeds)


def on_toy(args: argparse.Namespace, *, signed: bool) -> dict[str, list[Row]]:
    """The ledger on rows made from known atoms."""
    steps, batch = args.toy_steps, 512

    def measured(method: DictionaryMethod, seed: int) -> Row:
        bed = Superposition(signed=signed, seed=seed)
        full = replace(method, width=2 * bed.atoms, tokens=steps * batch, lr=2e-3)
        made = train(
            bed.batches(batch, seed=seed),
            width=2 * bed.atoms,
            rule=full.rule(),
            recipe=full.recipe(steps, batch),
        )
        rows = bed.batches(4096, seed=500)
        score = score_rows(made, (next(rows) for _ in range(8)))
        return {
            "EV": score.ev,
            "L0": score.l0,
            "dead": score.dead,
            "MCC": matched_cosine(made.W_dec, bed.true_atoms()),
            "twins": antiparallel(made.W_dec),
        }

    print(
        f"# {'signed ' if signed else ''}superposition: 5 of 96 atoms, 192 latents, {steps} steps"
    )
    chosen = _chosen(args, 5)
    chosen.pop("gradient_sae", None)
    return ledger(measured, chosen, args.seeds)


def _chosen(args: argparse.Namespace, k: int) -> dict[str, DictionaryMethod]:
    every = methods(k, args.l1, args.gated)
    unknown = set(args.methods or ()) - set(every)
    if unknown:
        raise SystemExit(f"unknown methods {sorted(unknown)}; known: {', '.join(every)}")
    return {name: m for name, m in every.items() if not args.methods or name in args.methods}


def main() -> None:
    """Parse, run, and write the rows where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="nano, a folder or a hub id")
    parser.add_argument("--data", default=None, help="text file; default: the packaged text")
    parser.add_argument("--hook", default=None, help="module; default: the middle block")
    parser.add_argument("--toy", action="store_true", help="the toy beds")
    parser.add_argument("--tokens", type=int, default=65536, help="rows of one pass")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--l1", type=float, default=3.75, help="penalty of relu_sae")
    parser.add_argument("--gated", type=float, default=2.3, help="penalty of gated_sae")
    parser.add_argument("--toy-steps", type=int, default=3500)
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, dict[str, list[Row]]] = {}
    if args.model:
        found[args.model] = on_model(args)
    if args.toy:
        found["superposition"] = on_toy(args, signed=False)
        found["signed superposition"] = on_toy(args, signed=True)
    if not found:
        parser.error("give --model or --toy")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
