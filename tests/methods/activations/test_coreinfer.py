"""CoreInfer under generate: what is gathered is what was voted for, and it stays what it was."""

import copy

import pytest
import torch

from gossamer.core import GossamerError, kept_count
from gossamer.methods.activations.coreinfer import CoreInfer
from gossamer.models import Tokens, find_sites
from tests.models.tiny import tiny_model

torch.set_num_threads(1)
WHOLE = (0.0, 1.0)


def _ids(rows: int = 3, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _decode(model, ids: torch.Tensor, prompt: int, mask=None) -> torch.Tensor:
    """Logits of the tokens after the prompt, fed one by one through the cache."""
    out, parts = None, []
    for low, high in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        past = {} if out is None else {"past_key_values": out.past_key_values}
        if mask is not None:
            past["attention_mask"] = mask[:, :high]
            past["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, low:high]
        out = model(input_ids=ids[:, low:high], use_cache=True, **past)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "gemma3", "qwen3_moe"])
def test_decoding_on_gathered_weights_is_scoring_under_the_mask(name: str) -> None:
    model, ids = tiny_model(name), _ids()
    with CoreInfer(sparsity=0.5, layers=WHOLE, prompt=16).apply(model) as work, torch.no_grad():
        scored = model(input_ids=ids, use_cache=False).logits
        decoded = _decode(model, ids, 16)
        gathered = [s for parts in work.session.last.slices.values() for s in parts]
        assert gathered
        assert all(s.down.shape[1] < layer.neurons for s, layer in
                   zip(gathered, work.plan.layers.values(), strict=False))  # fmt: skip
    dense = model(input_ids=ids).logits
    torch.testing.assert_close(decoded, scored, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded[:, :16], dense[:, :16], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(decoded[:, 16:], dense[:, 16:], atol=1e-2)


def test_the_core_is_what_a_plain_count_over_the_prompt_says() -> None:
    model, ids = tiny_model("llama"), _ids(1, 12)
    seen: list[torch.Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with CoreInfer(sparsity=0.75, layers=WHOLE, alpha=0.3).apply(model) as work:
        out = model(input_ids=ids, use_cache=True)
        handle.remove()
        core = work.cores(out.past_key_values)["model.layers.1.mlp.down_proj"]
        a = seen[0][0]
        count = round(0.3 * float((a > 0).sum(1).float().mean()))
        votes = torch.zeros(64)
        for token in a:
            votes[token.abs().argsort(descending=True)[:count]] += 1
        total = a.abs().sum(0)
        ranked = sorted(range(64), key=lambda j: (-float(votes[j]), -float(total[j])))
        expected = sorted(ranked[: kept_count(64, 0.75)])
        assert core.mask()[0].nonzero()[:, 0].tolist() == expected


def test_a_row_of_a_padded_batch_answers_as_it_does_alone() -> None:
    model, ids = tiny_model("llama"), _ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with CoreInfer(sparsity=0.6, layers=WHOLE).apply(model) as work:
        both = _decode(model, ids, 14, mask)
        assert work.session.last.slices["model.layers.0.mlp.down_proj"][0].inside is not None
        alone = [_decode(model, ids[:1, 6:], 8), _decode(model, ids[1:], 14)]
    torch.testing.assert_close(both[0, 6:], alone[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], alone[1][0], rtol=1e-4, atol=1e-4)


def test_two_prompts_may_be_continued_side_by_side() -> None:
    model, ids = tiny_model("llama"), _ids(2, 14)
    with CoreInfer(sparsity=0.6, layers=WHOLE).apply(model), torch.no_grad():
        alone = [_decode(model, row[None], 12)[:, 12:] for row in ids]
        caches = [model(input_ids=row[None, :12], use_cache=True).past_key_values for row in ids]
        mixed: list[list[torch.Tensor]] = [[], []]
        for t in (12, 13):
            for i in (0, 1):
                out = model(input_ids=ids[i : i + 1, t : t + 1], past_key_values=caches[i])
                mixed[i].append(out.logits)
    for one, other in zip(alone, mixed, strict=True):
        torch.testing.assert_close(torch.cat(other, 1), one, rtol=1e-4, atol=1e-4)


def test_a_prompt_in_chunks_votes_as_a_whole() -> None:
    model, ids = tiny_model("llama"), _ids(1, 16)
    method = CoreInfer(sparsity=0.6, layers=WHOLE, alpha=1.0, score="contribution")
    with method.apply(model) as work, torch.no_grad():
        first = model(input_ids=ids[:, :8], use_cache=True)
        out = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
        chunked = work.session.memories[out.past_key_values].tallies
        whole = model(input_ids=ids, use_cache=True).past_key_values
        for name, tally in work.session.memories[whole].tallies.items():
            assert torch.allclose(tally.strength, chunked[name].strength, rtol=1e-4)


def test_generate_runs_unchanged_and_weights_are_gathered_once() -> None:
    model, ids = tiny_model("llama"), _ids(2, 10)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    dense = model.generate(ids, **options)
    with CoreInfer(sparsity=0.7, layers=WHOLE).apply(model) as work:
        sparse = model.generate(ids, **options)
        assert work.selections == 1
        assert not work.simulated
    assert sparse.shape == dense.shape == (2, 16)
    assert not torch.equal(sparse, dense)
    assert torch.equal(model.generate(ids, **options), dense)
    with CoreInfer(sparsity=0.0, layers=WHOLE).apply(model):
        assert torch.equal(model.generate(ids, **options), dense)


def test_a_cache_filled_elsewhere_is_continued_densely_and_reported() -> None:
    model, ids = tiny_model("llama"), _ids(1, 9)
    with torch.no_grad():
        out = model(input_ids=ids[:, :8], use_cache=True)
        dense = model(
            input_ids=ids[:, 8:], past_key_values=copy.deepcopy(out.past_key_values)
        ).logits
        with CoreInfer(sparsity=0.6, layers=WHOLE).apply(model) as work:
            same = model(input_ids=ids[:, 8:], past_key_values=out.past_key_values).logits
            assert any("not filled here" in note for note in work.report().notes)
    assert torch.equal(same, dense)


def test_drift_chooses_anew_from_what_was_decoded() -> None:
    model, ids = tiny_model("llama"), _ids(2, 40)
    options = {"sparsity": 0.6, "layers": WHOLE, "probe": 4, "window": 3}
    with CoreInfer(**options, drift=1e-9).apply(model) as calm:
        quiet = _decode(model, ids, 8)
        assert calm.selections == 1
        before = calm.cores()
    with CoreInfer(sparsity=0.6, layers=WHOLE).apply(model):
        plain = _decode(model, ids, 8)
    # A probe is a dense token; until the first one nothing differs.
    torch.testing.assert_close(quiet[:, :11], plain[:, :11])
    with CoreInfer(**options, drift=1.0).apply(model) as restless:
        _decode(model, ids, 8)
        assert restless.selections > 1
        assert restless.cores() != before


def test_with_drift_too_a_row_answers_as_it_does_alone() -> None:
    model, ids = tiny_model("llama"), _ids(3, 40)
    method = CoreInfer(sparsity=0.6, layers=WHOLE, probe=4, window=3, drift=0.9)
    with method.apply(model) as work:
        both = _decode(model, ids, 8)
        assert work.selections > 1
        alone = [_decode(model, row[None], 8) for row in ids]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_similarity_learns_sets_that_alike_prompts_share() -> None:
    model = tiny_model("llama")
    # Two kinds of text: a few words each, none in common.
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randint(low, low + 3, (8, 24), generator=generator) for low in (5, 90)]
    corpus = Tokens.from_ids(torch.cat(kinds))
    method = CoreInfer(sparsity=0.5, layers=WHOLE, guidance="similarity", clusters=2)
    with method.apply(model, corpus) as work, torch.no_grad():
        clusters = work.plan.clusters
        assert clusters is not None
        assert clusters.centroids.shape == (2, 64)
        found = []
        for kind in kinds:
            out = model(input_ids=kind[:4], use_cache=True)
            memory = work.session.memories[out.past_key_values]
            labels = clusters.label(memory.sentence(clusters.layer))
            assert len(set(labels.tolist())) == 1
            found.append(int(labels[0]))
            model(input_ids=kind[:4, :1], past_key_values=out.past_key_values)
            assert torch.equal(
                memory.cores[clusters.layer][0], clusters.cores[clusters.layer][labels[0]]
            )
            assert int(memory.cores[clusters.layer][0].sum()) == 32
        assert sorted(found) == [0, 1]
        ids = _ids(2, 24)
        work.session.prompt = 16
        scored = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(_decode(model, ids, 16), scored, rtol=1e-4, atol=1e-4)
        state = work.state()
    again = method.reattach(model, state.meta, state.tensors)
    assert torch.equal(again.plan.clusters.centroids, clusters.centroids)
    assert all(torch.equal(again.plan.clusters.cores[n], c) for n, c in clusters.cores.items())
    again.restore()
    with pytest.raises(GossamerError, match="the model they were learned on"):
        method.reattach(tiny_model("gpt2"), state.meta, state.tensors)
    few = Tokens.from_ids(corpus.input_ids[:3])
    with pytest.raises(GossamerError, match="cannot form 4 clusters"):
        CoreInfer(guidance="similarity").apply(model, few)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 17}, "raise probe"),
        ({"guidance": "luck"}, "choose from stability, similarity"),
        ({"score": "x"}, "choose from magnitude"),
        ({"alpha": 0.0}, "0 < alpha <= 1"),
        ({"drift": 1.5}, "0 < drift <= 1"),
        ({"layers": (0.5, 0.2)}, "two shares of the depth"),
        ({"probe": 0}, "at least 1"),
        ({"clusters": 0}, "at least 1"),
    ],
)
def test_impossible_values_are_refused(values, message) -> None:
    with pytest.raises(GossamerError, match=message):
        CoreInfer(**values)


def test_the_report_counts_what_a_decoded_token_does_not_read() -> None:
    model = tiny_model("llama")
    with CoreInfer(sparsity=0.75).apply(model) as work:
        report = work.report()
        sites = find_sites(model).in_block(1)
        mlp = [s for s in sites if s.role.startswith("mlp")]
        assert {row.name for row in report.rows} == {s.name for s in mlp}
        assert work.weight_bytes_saved() == 0.75 * 4 * sum(s.size for s in mlp)
