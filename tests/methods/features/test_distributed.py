import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.core import GossamerError
from gossamer.methods.features.distributed import DataParallel, LatentSharded
from gossamer.methods.features.objective import Terms, objective
from gossamer.methods.features.rules import BatchTopK, Codes, FeatureChoice, TopK
from gossamer.methods.features.toy import Superposition
from gossamer.methods.features.training import Recipe, Trainer

BED = Superposition(d_in=16, atoms=24, active=2.0)
STEPS, ROWS, WIDTH = 12, 32, 48


def batches():
    """Half of the rows of one batch are one process's, half the other's."""
    return list(islice(BED.batches(2 * ROWS), STEPS + 1))


def trainer(sample, parallel=None, seed=0, rule=None):
    # Latents die after one batch, so that the auxiliary loss takes part.
    recipe = Recipe(steps=STEPS, batch_size=2 * ROWS, lr=1e-2, dead_after=2 * ROWS, seed=seed)
    rule = TopK(3) if rule is None else rule
    return Trainer(sample, width=WIDTH, rule=rule, recipe=recipe, parallel=parallel)


def run(parallel, rows, seed=0, rule=None):
    work = trainer(rows[0], parallel, seed, rule)
    for batch in rows[1:]:
        work.step(batch)
    assert len(work.dead()) or rule is not None
    return work.finish()


def one_of_two(rank, folder):
    """What each of two processes does."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    everything = batches()
    own = [batch[rank * ROWS : (rank + 1) * ROWS] for batch in everything]
    # Seeds differ: all must start from the first process's draw.
    found = {
        "data": run(DataParallel(), own, seed=rank),
        "latents": run(LatentSharded(), everything),
        "running": run(DataParallel(), own, seed=rank, rule=FeatureChoice(3, WIDTH)),
    }
    for name, made in found.items():
        tensors = {n: t.contiguous() for n, t in made.state_dict().items()}
        save_file(tensors, f"{folder}/{name}-{rank}.safetensors")
    rule = BatchTopK(3)
    rule.running_threshold.fill_(2.0 + rank)
    rule.running_steps.fill_(7)
    DataParallel().track(rule)
    assert (rule.running_threshold.item(), rule.running_steps.item()) == (2.5, 7)
    with pytest.raises(GossamerError, match="equal shares"):
        recipe = Recipe(steps=1, batch_size=4)
        Trainer(everything[0], width=33, rule=TopK(3), recipe=recipe, parallel=LatentSharded())
    torch.distributed.destroy_process_group()


class Halves:
    """The update of two processes, in one: the mean of the losses of the two halves."""

    def rows(self, rows):
        return rows

    def local(self, whole):
        return whole

    def whole(self, local):
        return local

    def objective(self, made, rows, **options):
        first, second = (objective(made, half, **options) for half in rows.split(ROWS))
        codes = Codes(*(torch.cat(pair) for pair in zip(first.codes, second.codes, strict=True)))
        return Terms((first.loss + second.loss) / 2, first.fvu, codes)

    def fired(self, marks, rows):
        return marks, rows

    def reduce(self, parameters):
        pass

    def track(self, rule):
        pass

    def total(self, squares):
        return torch.stack(list(squares.values())).sum()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    root = str(Path(__file__).parents[3])
    # One fresh interpreter splits in two: the imports, which take longest, happen once.
    code = (
        f"import os, sys; sys.path.insert(0, {root!r})\n"
        "from tests.methods.features.test_distributed import one_of_two\n"
        "child = os.fork()\n"
        f"one_of_two(0 if child else 1, {str(folder)!r})\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["data", "latents", "running"])
def test_processes_end_with_the_same_dictionary(trained, name):
    first, second = (load_file(trained / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["W_dec"].shape == (WIDTH, 16)


def test_rows_shared_out_are_micro_batches(trained, monkeypatch):
    everything = batches()
    halves = Halves()
    monkeypatch.setattr("gossamer.methods.features.training._first", lambda rows: rows[:ROWS])
    wanted = run(halves, everything).state_dict()
    for name, tensor in load_file(trained / "data-0.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_latents_shared_out_are_one_dictionary(trained):
    wanted = run(None, batches()).state_dict()
    for name, tensor in load_file(trained / "latents-0.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_without_a_group_it_is_one_line():
    for kind in (DataParallel, LatentSharded):
        with pytest.raises(GossamerError, match="init_process_group"):
            kind()
