"""How fast sparse autoencoders train: one step on a GPU, and end to end on a CPU.

    python benchmarks/sae_training.py gpu [--width 2048 --latents 65536 --k 64 --tokens 8192]
        [--against dense sae-lens sparsify] [--refs FOLDER] [--rounds 7] [--profile] [--json FILE]
    python benchmarks/sae_training.py cpu MODEL --texts FILE [FILE ...] [--threads 2]
        [--expansion 16 --k 32 --batch 1024 --tokens 81920 --passes 1] [--json FILE]

``gpu`` promises, at its defaults on an H200 with float32 masters and bfloat16 matrices: at least
2.5 times the tokens a second of a TopK step that decodes densely, 2 times those of sae-lens and
1.2 times those of EleutherAI's sparsify. A step is forward, backward, clipping, Adam and the count
of who fired; ours also keeps atoms at norm 1, projects their gradient and reads no less than
``Trainer`` does for a user. All train on the same eight batches of synthetic activations (sums of
skewed true atoms). No latent is dead within the run, so no auxiliary loss is due in any of them.
Rounds alternate between the trainers; times are those of 5 steps between two waits for the device,
speeds are medians of the rounds' ratios. Before anything is timed, the chosen latents must equal
an exact top-k, and the four gradients those of dense autograd, within bfloat16's rounding.

- dense: autocast, topk, codes scattered to full width, fused Adam. Nothing else.
- sae-lens: ``SAETrainer.step`` with ``TopKTrainingSAE``, autocast, as its defaults are.
- sparsify: ``SparseCoder`` and the steps of its trainer (clip, projection, Adam fused, norm).
``--refs`` names a folder with both packages unpacked, unmodified (and einops, natsort,
simple_parsing, docstring_parser, transformer_lens); their ``__init__`` is passed over, since it
imports what a step does not need.

``cpu`` promises at least 3,000 tokens a second end to end with 2 threads for a dictionary 16 times
as wide as the residual stream: every token runs through the model up to the middle block once.
With ``--passes 16``, as a method's ``fit`` trains unless told otherwise, rows stay in memory and
are trained on so many times.
"""

import argparse
import importlib
import json
import logging
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.kernels.sparse_code.reference import top_rows_reference
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.objective import objective
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.training import Recipe, Trainer, train
from gossamer.models import Tokens, find_sites, load_model

WARM, STEPS = 4, 5
PROMISES = {"dense": 2.5, "sae-lens": 2.0, "sparsify": 1.2}


def activations(args: argparse.Namespace, count: int = 8) -> list[Tensor]:
    """Batches of sums of 48 of 4 D true atoms, common and rare, with noise; mean norm sqrt(D)."""
    generator = torch.Generator(args.device).manual_seed(0)
    atoms = torch.randn(4 * args.width, args.width, device=args.device, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    weight = 1 / torch.arange(1, len(atoms) + 1, device=args.device) ** 0.7
    made = []
    for _ in range(count):
        at = torch.multinomial(weight, args.tokens * 48, True, generator=generator)
        size = 0.5 + torch.randn(args.tokens, 48, device=args.device, generator=generator).abs()
        rows = nn.functional.embedding_bag(
            at.view(-1, 48), atoms, per_sample_weights=size, mode="sum"
        )
        rows += 0.02 * torch.randn(rows.shape, device=args.device, generator=generator)
        made.append(rows * (args.width**0.5 / rows.norm(dim=1).mean()))
    return made


def ours(args: argparse.Namespace, sample: Tensor) -> Trainer:
    recipe = Recipe(steps=10**5, batch_size=args.tokens, seed=0)
    return Trainer(sample, width=args.latents, rule=TopK(args.k), recipe=recipe)


# -- the others ----------------------------------------------------------------------------------


class Dense(nn.Module):
    """A TopK autoencoder as one writes it down first."""

    def __init__(self, args: argparse.Namespace, start: Dictionary) -> None:
        super().__init__()
        self.k = args.k
        self.W_enc = nn.Parameter(start.W_enc.detach().float().contiguous().clone())
        self.W_dec = nn.Parameter(start.W_dec.detach().float().clone())
        self.b_enc = nn.Parameter(start.b_enc.detach().clone())
        self.b_dec = nn.Parameter(start.b_dec.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        code = torch.zeros_like(pre).scatter(1, indices, values.relu())
        return code @ self.W_dec + self.b_dec


def dense(args: argparse.Namespace, start: Dictionary) -> Callable[[Tensor], None]:
    model = Dense(args, start)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            out = model(x)
        ((x - out.float()).square().sum() / (x - x.mean(0)).square().sum()).backward()
        adam.step()

    return step


def unpacked(folder: str, name: str, **values: Any) -> None:
    """Let a package's modules be imported without its ``__init__``."""
    if folder not in sys.path:
        sys.path.append(folder)
    module = types.ModuleType(name)
    module.__path__ = [str(Path(folder) / name)]
    for key, value in values.items():
        setattr(module, key, value)
    sys.modules[name] = module


class _Anything(types.ModuleType):
    """Stands for a package that is imported by name and not used in a step."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def imported(name: str) -> Any:
    """A module of an unpacked package; what it imports and is not installed is stood in for."""
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = str(error.name)
            if missing in sys.modules or missing.split(".")[0] == name.split(".")[0]:
                raise
            sys.modules[missing] = _Anything(missing)
            sys.modules[missing].__spec__ = ModuleSpec(missing, None)


def sae_lens(args: argparse.Namespace, start: Dictionary) -> Callable[[Tensor], None]:
    unpacked(args.refs, "transformer_lens")
    points = imported("transformer_lens.hook_points")
    hooked = types.ModuleType("transformer_lens.HookedTransformer")
    hooked.HookedRootModule = points.HookedRootModule  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules[hooked.__name__] = hooked
    unpacked(args.refs, "sae_lens", __version__="6", logger=logging.getLogger("sae_lens"))
    registry = imported("sae_lens.registry")
    topk = imported("sae_lens.saes.topk_sae")
    registry.register_sae_class("topk", topk.TopKSAE, topk.TopKSAEConfig)
    registry.register_sae_training_class("topk", topk.TopKTrainingSAE, topk.TopKTrainingSAEConfig)
    training = imported("sae_lens.training.sae_trainer")
    config = imported("sae_lens.config")
    sae = topk.TopKTrainingSAE(
        topk.TopKTrainingSAEConfig(
            d_in=args.width, d_sae=args.latents, k=args.k, device=args.device, dtype="float32"
        )
    ).to(args.device)
    with torch.no_grad():
        sae.W_enc.copy_(start.W_enc.float())
        sae.W_dec.copy_(start.W_dec.float())
    trainer = training.SAETrainer(
        config.SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**9,
            device=args.device,
            autocast=True,
            lr=1e-4,
            lr_end=1e-5,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=args.tokens,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            logger=config.LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter(()),
    )

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def sparsify(args: argparse.Namespace, start: Dictionary) -> Callable[[Tensor], None]:
    unpacked(args.refs, "sparsify")
    coder = imported("sparsify.sparse_coder")
    config = imported("sparsify.config")
    sae = coder.SparseCoder(
        args.width,
        config.SparseCoderConfig(num_latents=args.latents, k=args.k),
        args.device,
        torch.float32,
    )
    with torch.no_grad():
        sae.encoder.weight.copy_(start.W_enc.T.float())
        sae.W_dec.copy_(start.W_dec.float())
    adam = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x: Tensor) -> None:
        if sae.cfg.normalize_decoder:
            sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        if sae.cfg.normalize_decoder:
            sae.remove_gradient_parallel_to_decoder_directions()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


OTHERS = {"dense": dense, "sae-lens": sae_lens, "sparsify": sparsify}

# -- correctness ---------------------------------------------------------------------------------


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check(args: argparse.Namespace, trainer: Trainer, batch: Tensor) -> dict[str, float]:
    """Relative errors of the four gradients, against autograd through dense codes in float32.

    Raises
    ------
    SystemExit
        If a latent chosen is not that of an exact top-k, or a gradient is off.
    """
    made = trainer.dictionary
    x = trainer.split(batch[: min(1024, args.tokens)])[0]
    terms = objective(
        made,
        x,
        aux_k=0,
        aux_coefficient=0.0,
        dead=torch.empty(0, dtype=torch.long, device=args.device),
    )
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    got = torch.autograd.grad(terms.loss, [getattr(made, name) for name in names])
    with torch.no_grad():
        pre = made.pre_activations(x)
        exact = top_rows_reference(pre.float(), args.k).sort(1).values
        real = pre.gather(1, exact) > 0
        wanted = exact.where(real, -1).sort(1).values
    if not torch.equal(terms.codes.indices.sort(1).values, wanted):
        raise SystemExit("the chosen latents are not those of an exact top-k")
    leaves = [getattr(made, name).detach().float().requires_grad_() for name in names]
    W_enc, b_enc, W_dec, b_dec = leaves
    plain = (x - b_dec) @ W_enc + b_enc
    mask = torch.zeros_like(plain, dtype=torch.bool)
    mask.scatter_(1, exact, real)
    error = x - (plain * mask) @ W_dec - b_dec
    loss = error.square().sum() / (x - x.mean(0)).square().sum()
    references = torch.autograd.grad(loss, leaves)
    errors = {n: distance(g, w) for n, g, w in zip(names, got, references, strict=True)}
    print("gradients, relative distance to dense autograd:", _short(errors))
    if max(errors.values()) > 2e-2:
        raise SystemExit("a gradient is off by more than bfloat16 explains")
    return errors


def _short(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in values.items())


# -- time ----------------------------------------------------------------------------------------


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(steps: dict[str, Callable[[Tensor], None]], batches: list[Tensor], rounds: int) -> dict:
    """Milliseconds of a step in every round, the trainers in turn."""
    for step in steps.values():
        for i in range(WARM):
            step(batches[i % len(batches)])
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            step(batches[turn % len(batches)])
            _wait()
            began = time.perf_counter()
            for i in range(STEPS):
                step(batches[(turn + i) % len(batches)])
            _wait()
            times[name].append((time.perf_counter() - began) / STEPS * 1000)
    return times


def profile(step: Callable[[Tensor], None], batches: list[Tensor]) -> None:
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as prof:
        for i in range(STEPS):
            step(batches[i])
        _wait()
    rows = [e for e in prof.key_averages() if e.self_device_time_total > 0]
    for event in sorted(rows, key=lambda e: -e.self_device_time_total)[:24]:
        each = event.self_device_time_total / STEPS / 1000
        print(f"  {each:7.3f} ms  {event.count / STEPS:5.1f} x  {event.key[:90]}")


def gpu(args: argparse.Namespace) -> dict[str, Any]:
    batches = activations(args)
    trainer = ours(args, batches[0])
    found: dict[str, Any] = {"device": args.device, "torch": torch.__version__}
    found["gradients"] = check(args, trainer, batches[1])
    steps: dict[str, Callable[[Tensor], None]] = {"gossamer": trainer.step}
    if args.profile:
        for i in range(WARM):
            trainer.step(batches[i])
        profile(trainer.step, batches)
    for name in args.against:
        try:
            steps[name] = OTHERS[name](args, trainer.dictionary)
        except Exception as error:  # a missing package must not cost the other figures
            print(f"{name}: not measured, {type(error).__name__}: {error}")
            if args.debug:
                raise
    times = timed(steps, batches, args.rounds)
    print(f"D {args.width}, M {args.latents}, k {args.k}, {args.tokens} tokens a step")
    for name, values in times.items():
        middle = statistics.median(values)
        ratios = [b / a for a, b in zip(times["gossamer"], values, strict=True)]
        found[name] = {"ms": middle, "tokens_per_s": args.tokens / middle * 1000, "all": values}
        line = f"{name:9} {middle:8.2f} ms {args.tokens / middle:9.0f} thousand tokens/s"
        if name != "gossamer":
            speed = statistics.median(ratios)
            found[name]["gossamer_is_faster_by"] = speed
            line += f"   gossamer is {speed:.2f} x (promised {PROMISES[name]} x)"
        print(line, f"  [{min(values):.2f}, {max(values):.2f}]")
    print(f"FVU of the last batch: {trainer.fvu:.3f} after {trainer.done} steps")
    if args.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def cpu(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    texts = [Path(name).read_text(encoding="utf-8") for name in args.texts]
    tokens = Tokens.from_documents(texts, loaded.tokenizer, length=args.context)
    live = args.passes == 1
    need = -(-(args.tokens // args.passes + 2 * args.buffer * live) // args.context)
    if len(tokens) < need:
        raise SystemExit(f"the texts hold {tokens.count} tokens; give more, or fewer --tokens")
    tokens = tokens.slice(need)
    blocks = find_sites(loaded.model).blocks
    began, worked = time.perf_counter(), time.process_time()
    source = ActivationSource(
        loaded.model,
        blocks[len(blocks) // 2],
        tokens,
        resident_bytes=0 if live else 1 << 30,
        buffer=args.buffer,
    )
    width, steps = args.expansion * source.width, args.tokens // args.batch
    # Latents count as dead when they would in a run of ten million tokens.
    recipe = Recipe(steps=steps, batch_size=args.batch, dead_after=500_000)
    made = train(source.batches(args.batch), width=width, rule=TopK(args.k), recipe=recipe)
    spent, busy = time.perf_counter() - began, time.process_time() - worked
    speed = steps * args.batch / spent
    print(
        f"D {source.width}, M {made.d_sae}, k {args.k}, {steps} steps of {args.batch} on "
        f"{source.path}, {args.threads} threads: {spent:.1f} s, {speed:.0f} tokens/s end to end "
        f"(promised 3000); {busy:.1f} s of processor time"
    )
    return {
        "tokens_per_s": speed,
        "seconds": spent,
        "cpu_seconds": busy,
        "threads": args.threads,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    first = modes.add_parser("gpu")
    for name, value in (("width", 2048), ("latents", 65536), ("k", 64), ("tokens", 8192)):
        first.add_argument(f"--{name}", type=int, default=value)
    first.add_argument("--against", nargs="*", choices=list(OTHERS), default=list(OTHERS))
    first.add_argument("--refs", default=".")
    first.add_argument("--device", default="cuda")
    first.add_argument("--rounds", type=int, default=7)
    first.add_argument("--debug", action="store_true")
    first.add_argument("--profile", action="store_true")
    second = modes.add_parser("cpu")
    second.add_argument("model")
    second.add_argument("--texts", nargs="+", required=True)
    for name, value in (
        *(("threads", 2), ("expansion", 16), ("k", 32), ("batch", 1024), ("tokens", 81920)),
        *(("context", 256), ("buffer", 8192), ("passes", 1)),
    ):
        second.add_argument(f"--{name}", type=int, default=value)
    for mode in (first, second):
        mode.add_argument("--json")
    args = parser.parse_args()
    found = gpu(args) if args.mode == "gpu" else cpu(args)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
