import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.layout import Layout
from gossamer.methods.attention.quest import PageSelector, Quest
from tests.models.tiny import tiny_model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(queries, keys, batch=1):
    key = normal(batch, 2, keys, 8)
    return Call(normal(batch, 4, queries, 8, seed=1), key, key)


def test_the_page_with_the_needle_and_the_open_page_are_read():
    one = call(1, 43)
    query = one.grouped_query()
    for g, page in ((0, 3), (1, 7)):
        one.key[0, g, page * 4 + 2] = 6 * query[0, g].sum(0)[0]
    index = PageSelector(4, "minmax", None, 12).select(one, Layout(1, 1, 43, query_offset=42), 0)
    listed = index.blocks()[0, :, 0]
    assert listed.sum(-1).tolist() == [3, 3]
    assert listed[0, 3]
    assert listed[1, 7]
    assert listed[:, 10].all()
    assert index.block == (1, 4)


def test_pages_are_shared_by_summed_scores():
    """Two heads that each want a page must not hide the page both want a little."""
    key = torch.zeros(1, 1, 17, 3)
    key[0, 0, 0, 0], key[0, 0, 4, 1], key[0, 0, 8, 2] = 10.0, 10.0, 10.0
    query = torch.tensor([[1.0, 0.0, 0.7], [0.0, 1.0, 0.7]]).view(1, 2, 1, 3)
    one = Call(query, key, key)
    selector = PageSelector(4, "minmax", None, 12)
    index = selector.select(one, Layout(1, 1, 17, query_offset=16), 0)
    assert index.blocks()[0, 0, 0].nonzero()[:, 0].tolist()[-2:] == [2, 4]


def test_several_queries_choose_as_each_alone():
    both = call(5, 30)
    selector = PageSelector(4, "minmax", 0.5, None)
    got = selector.select(both, Layout(1, 5, 30, query_offset=25), 0).mask()
    for row in range(5):
        end = 26 + row
        alone = Call(both.query[:, :, row : row + 1], both.key[:, :, :end], both.key[:, :, :end])
        want = selector.select(alone, Layout(1, 1, end, query_offset=end - 1), 0).mask()
        assert torch.equal(got[:, :, row, :end], want[:, :, 0]), row


def test_padded_rows_choose_as_alone():
    batch = call(1, 24, batch=2)
    padding = torch.ones(2, 24, dtype=torch.bool)
    padding[1, :5] = False
    layout = Layout(2, 1, 24, query_offset=23, padding=padding)
    selector = PageSelector(4, "meanstd", 0.4, None)
    got = selector.select(batch, layout, 0).mask()[1]
    alone = Call(batch.query[1:], batch.key[1:, :, 5:], batch.key[1:, :, 5:])
    want = selector.select(alone, Layout(1, 1, 19, query_offset=18), 0).mask()[0]
    assert torch.equal(got[..., 5:], want)


def test_at_least_three_pages_and_never_more_than_there_are():
    one = call(1, 9)
    few = PageSelector(4, "minmax", None, 1).select(one, Layout(1, 1, 9, query_offset=8), 0)
    assert few.mask().all()
    one = call(1, 40)
    few = PageSelector(4, "minmax", None, 1).select(one, Layout(1, 1, 40, query_offset=39), 0)
    assert few.pairs() == (2 * 12, 2 * 40)


def test_bad_input():
    with pytest.raises(GossamerError, match="unknown page scorer 'minmix'; did you mean minmax"):
        Quest(scorer="minmix")
    with pytest.raises(GossamerError, match="page_size"):
        Quest(page_size=0)


def test_first_layers_stay_full_and_are_counted():
    model = tiny_model("llama")
    with Quest(dense_layers=1, page_size=2).apply(model) as work, torch.no_grad():
        cache = model(torch.arange(3, 23)[None], use_cache=True).past_key_values
        model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        assert work.guarded == 1
        assert "choosing reads 1/2 of the keys'" in str(work.report())


def test_a_static_cache_without_padding_is_plain_and_read_by_pages():
    """Its numbered mask says no more than causality: the fused kernel may choose there too."""
    model = tiny_model("llama")
    seen = []
    select = PageSelector.select

    def noting(self, call, layout, layer):
        index = select(self, call, layout, layer)
        if layout.queries == 1:
            seen.append((type(index).__name__, layout.plain, layout.end))
        return index

    prompt = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageSelector, "select", noting)
        with Quest(page_size=2, dense_layers=1).apply(model):
            dynamic = model.generate(prompt, **options)
            static = model.generate(prompt, cache_implementation="static", **options)
    assert torch.equal(dynamic, static)
    assert seen == [("BestPages", True, 21 + n) for n in range(3)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_on_a_gpu_runs_the_paged_kernel(padded, cache, monkeypatch):
    """The kernel that chooses runs wherever rows are not padded, and answers as the definition."""
    from gossamer.methods.attention.executors import triton_decode

    fused = []
    kernel = triton_decode.page_decode
    monkeypatch.setattr(
        triton_decode, "page_decode", lambda *a, **o: (fused.append(1), kernel(*a, **o))[1]
    )
    model = tiny_model("llama").cuda()
    prompt = torch.randint(3, 128, (2, 70), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(prompt)
    if padded:
        mask[1, :9] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    answers = {}
    for backend in ("auto", "reference"):
        method = Quest(page_size=4, budget_tokens=24, dense_layers=0, backend=backend)
        with method.apply(model) as work:
            answers[backend] = model.generate(prompt, **options)
            if backend == "auto" and not (padded and cache == "static"):
                assert work.ran["triton_decode"] == 2 * 5, work.ran
    assert len(fused) == (0 if padded else 2 * 5)
    assert torch.equal(answers["auto"].sequences, answers["reference"].sequences)
    for a, b in zip(answers["auto"].logits, answers["reference"].logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
