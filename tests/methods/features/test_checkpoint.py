import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.core import GossamerError
from gossamer.methods.features import checkpoint as module
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.toy import Superposition
from gossamer.methods.features.training import Recipe, train
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

EVERY, STEPS = 4, 30


def source(resident=0):
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.from_ids(torch.randint(3, 128, (12, 20), generator=generator))
    return ActivationSource(
        tiny_model("llama"),
        "model.layers.0",
        tokens,
        windows=2,
        buffer=64,
        resident_bytes=resident,
    )


def fit(path=None, *, resident=0, progress=None, k=3, lr=1e-2):
    # Latents die within the run, so that the auxiliary loss and its counters matter.
    recipe = Recipe(steps=STEPS, batch_size=16, lr=lr, dead_after=64)
    return train(
        source(resident).batches(16),
        width=64,
        rule=TopK(k),
        recipe=recipe,
        checkpoint=path,
        every=EVERY,
        progress=progress,
    )


def equal(first, second):
    return all(torch.equal(second.state_dict()[n], t) for n, t in first.state_dict().items())


class Stop(Exception):  # noqa: N818
    pass


def stop_at(step):
    def progress(done, total, text):
        if done == step:
            raise Stop

    return progress


@pytest.mark.parametrize("resident", [0, 1 << 28])
@pytest.mark.parametrize("step", [5, 19, 29])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, step, resident):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        fit(path, resident=resident, progress=stop_at(step))
    assert int(load_file(path)["trainer/done"]) == step // EVERY * EVERY
    seen = []
    again = fit(path, resident=resident, progress=lambda done, *rest: seen.append(done))
    assert seen[0] == step // EVERY * EVERY + 1
    assert equal(again, fit(resident=resident))
    assert not path.exists()


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads({threads})
from tests.methods.features.test_checkpoint import fit
fit({path!r}, progress=lambda done, *rest: print(done, flush=True))
"""


def test_a_killed_process_loses_at_most_one_interval(tmp_path):
    path, root = tmp_path / "run.safetensors", str(Path(__file__).parents[3])
    code = SCRIPT.format(root=root, path=str(path), threads=torch.get_num_threads())
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        try:
            done = 0
            while done < 10:
                done = int(child.stdout.readline())
        finally:
            os.kill(child.pid, signal.SIGKILL)
        done = max([done, *map(int, child.stdout.read().split())])
    # Never a torn file under the final name; a torn temporary one may stay, and is not read.
    kept = int(load_file(path)["trainer/done"])
    assert done < STEPS
    assert done - kept <= EVERY
    seen = []
    again = fit(path, progress=lambda done, *rest: seen.append(done))
    assert seen[0] == kept + 1
    assert equal(again, fit())


def test_another_run_or_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        fit(path, progress=stop_at(9))
    with pytest.raises(GossamerError, match="of another run: recipe"):
        fit(path, lr=2e-2)
    with pytest.raises(GossamerError, match="of another run: rule"):
        fit(path, k=2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(GossamerError, match="is no checkpoint"):
        fit(path)


def test_rows_kept_otherwise_than_before_are_another_run(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        fit(path, progress=stop_at(9))
    with pytest.raises(GossamerError, match="resident differ"):
        fit(path, resident=1 << 28)


def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    path, saves = tmp_path / "run.safetensors", []

    def full(tensors, name, metadata=None):
        saves.append(name)
        if len(saves) == 3:
            Path(name).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, name, metadata)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(GossamerError, match="No space left") as raised:
        fit(path)
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    assert int(load_file(path)["trainer/done"]) == 2 * EVERY
    monkeypatch.undo()
    assert equal(fit(path), fit())


def test_a_stream_without_a_place_has_no_checkpoint(tmp_path):
    bed = Superposition(d_in=8, atoms=12, active=2.0)
    recipe = Recipe(steps=3, batch_size=8)
    with pytest.raises(GossamerError, match="knows its place"):
        train(bed.batches(8), width=16, rule=TopK(2), recipe=recipe, checkpoint=tmp_path / "x")
