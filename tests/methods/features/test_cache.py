import errno
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gossamer.core import GossamerError
from gossamer.methods.features import cache as module
from gossamer.methods.features.cache import CachedSource, cache_activations
from gossamer.methods.features.rules import TopK
from gossamer.methods.features.source import ActivationSource
from gossamer.methods.features.training import Recipe, train
from gossamer.models import Tokens
from tests.models.tiny import tiny_model


def source(seed=0, path="model.layers.0", windows=12, **options):
    generator = torch.Generator().manual_seed(seed)
    tokens = Tokens.from_ids(torch.randint(3, 128, (windows, 20), generator=generator))
    return ActivationSource(tiny_model("llama"), path, tokens, windows=2, **options)


def test_what_is_read_back_is_what_the_model_gave(tmp_path):
    made = cache_activations(source(), tmp_path / "c", shard_rows=60)
    wanted = torch.cat(list(source().one_pass()))
    assert torch.equal(torch.cat(list(made.one_pass())), wanted)
    assert (made.count, made.width, made.path) == (240, 32, "model.layers.0")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 3
    assert made.metadata()["cached"] == "float32"
    assert made.metadata()["sink_norm"] == source().sink_norm
    half = cache_activations(source(), tmp_path / "h", dtype="bfloat16")
    torch.testing.assert_close(torch.cat(list(half.one_pass())), wanted, rtol=1e-2, atol=1e-2)
    assert sum(len(block) for block in made.head(50)) >= 50


@pytest.mark.parametrize("resident", [0, 1 << 28])
def test_batches_shuffle_all_rows_and_train_resumably(tmp_path, resident):
    cache_activations(source(), tmp_path / "c", shard_rows=60)
    cached = CachedSource(tmp_path / "c", resident_bytes=resident, buffer=64)
    wanted = torch.cat(list(cached.one_pass()))
    found = torch.cat(list(islice(cached.batches(16), 60)))
    assert not torch.equal(found[:16], wanted[:16])
    assert {tuple(r) for r in found.tolist()} == {tuple(r) for r in wanted.tolist()}

    def fit(stop=None):
        def progress(done, total, text):
            if done == stop:
                raise KeyboardInterrupt

        source = CachedSource(tmp_path / "c", resident_bytes=resident, buffer=64)
        recipe = Recipe(steps=12, batch_size=16, lr=1e-2)
        options = {"checkpoint": tmp_path / "run", "every": 5, "progress": progress}
        return train(source.batches(16), width=48, rule=TopK(3), recipe=recipe, **options)

    with pytest.raises(KeyboardInterrupt):
        fit(stop=8)
    assert torch.equal(fit().W_dec, fit().W_dec)


def test_a_full_disk_stops_cleanly_and_the_same_call_goes_on(tmp_path, monkeypatch):
    saves = []

    def full(tensors, name):
        saves.append(name)
        if len(saves) == 3:
            Path(name).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, name)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(GossamerError, match=r"is full after 160 rows, 8 of 12 windows") as raised:
        cache_activations(source(), tmp_path, shard_rows=60)
    assert "\n" not in str(raised.value)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(GossamerError, match="8 of 12 windows; run cache_activations again"):
        CachedSource(tmp_path)
    monkeypatch.undo()
    again, runs = source(), []
    handle = again.model.model.layers[0].register_forward_pre_hook(lambda m, a: runs.append(1))
    made = cache_activations(again, tmp_path, shard_rows=60)
    handle.remove()
    assert len(runs) == 2
    assert torch.equal(torch.cat(list(made.one_pass())), torch.cat(list(source().one_pass())))
    # A finished cache is only opened.
    before = (tmp_path / "index.json").read_bytes()
    cache_activations(source(), tmp_path, shard_rows=60)
    assert (tmp_path / "index.json").read_bytes() == before


def test_an_index_that_cannot_be_written_leaves_no_unnamed_progress(tmp_path, monkeypatch):
    real, calls = module.write_json, []

    def full(path, value):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, value)

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(GossamerError, match="is full after 80 rows"):
        cache_activations(source(), tmp_path, shard_rows=60)
    monkeypatch.undo()
    made = cache_activations(source(), tmp_path, shard_rows=60)
    assert torch.equal(torch.cat(list(made.one_pass())), torch.cat(list(source().one_pass())))


def test_a_changed_or_missing_shard_is_named(tmp_path):
    cache_activations(source(), tmp_path, shard_rows=60)
    shard = tmp_path / "rows-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(GossamerError, match="rows-00001.safetensors was changed"):
        list(CachedSource(tmp_path).one_pass())
    shard.unlink()
    with pytest.raises(GossamerError, match="rows-00001.safetensors cannot be read"):
        list(CachedSource(tmp_path).one_pass())


def test_another_source_is_not_mixed_in(tmp_path):
    cache_activations(source(), tmp_path)
    for other in (source(seed=1), source(path="model.layers.1"), source(sink_multiple=None)):
        with pytest.raises(GossamerError, match="caches other activations"):
            cache_activations(other, tmp_path)
    with pytest.raises(GossamerError, match="dtype differs"):
        cache_activations(source(), tmp_path, dtype="float16")
    with pytest.raises(GossamerError, match="dtype"):
        cache_activations(source(), tmp_path / "x", dtype="int3")


def test_folders_that_are_no_cache(tmp_path):
    with pytest.raises(GossamerError, match="no readable cache"):
        CachedSource(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(GossamerError, match="holds other files"):
        cache_activations(source(), tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(GossamerError, match="no readable cache"):
        CachedSource(tmp_path)
