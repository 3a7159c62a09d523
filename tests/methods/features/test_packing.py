import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import GossamerError
from gossamer.methods.features.packing import chat_documents, pack, special_ids
from gossamer.methods.features.source import ActivationSource
from tests.models.tiny import tiny_model

BLOCKS = {"llama": "model.layers.1", "gpt2": "transformer.h.1", "bert": "encoder.layer.1"}
DOCUMENTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [15, 16, 17, 18]]


def rows(model, path, packed, **options):
    source = ActivationSource(model, path, packed, sink_multiple=None, **options)
    return torch.cat(list(source.one_pass()))


def alone(model, path, tokens):
    found = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda m, a, out: found.append(out))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens]))
    finally:
        handle.remove()
    return (found[0][0] if isinstance(found[0], tuple) else found[0])[0]


def by_token(packed, made):
    """Rows of each (document number, token), as packing lays every token once."""
    keep = packed.keep
    return dict(zip(packed.input_ids[keep].tolist(), made, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("packing", ["none", "varlen"])
def test_documents_read_as_if_they_were_alone(name, packing):
    model = tiny_model(name)
    packed = pack(DOCUMENTS, length=8, packing=packing)
    found = by_token(packed, rows(model, BLOCKS[name], packed))
    for document in DOCUMENTS:
        wanted = alone(model, BLOCKS[name], document)
        got = torch.stack([found[token] for token in document])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_poisoned_neighbour_changes_nothing(name):
    model = tiny_model(name)
    other = [[5, 6, 7], [90, 91, 92, 93, 94], [13, 14], [99, 98, 97, 96]]
    clean, poisoned = (pack(d, length=8, packing="varlen") for d in (DOCUMENTS, other))
    assert len(clean) == 2
    first = by_token(clean, rows(model, BLOCKS[name], clean))
    second = by_token(poisoned, rows(model, BLOCKS[name], poisoned))
    for token in (5, 6, 7, 13, 14):
        assert torch.equal(first[token], second[token])


def test_concat_does_see_its_neighbour():
    model = tiny_model("llama")
    clean = pack([[5, 6], [7, 8]], length=4, packing="concat")
    other = pack([[9, 10], [7, 8]], length=4, packing="concat")
    first = by_token(clean, rows(model, BLOCKS["llama"], clean))
    second = by_token(other, rows(model, BLOCKS["llama"], other))
    assert not torch.allclose(first[8], second[8])


def test_what_the_packings_lay():
    none = pack(DOCUMENTS, length=4, packing="none")
    assert none.input_ids.tolist() == [
        [5, 6, 7, 0],
        [8, 9, 10, 11],
        [12, 0, 0, 0],
        [13, 14, 0, 0],
        [15, 16, 17, 18],
    ]
    concat = pack(DOCUMENTS[:2], length=5, packing="concat", separator=1)
    assert concat.input_ids.tolist() == [[5, 6, 7, 1, 8], [9, 10, 11, 12, 1]]
    assert concat.segments.tolist() == [[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    assert concat.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    varlen = pack(DOCUMENTS, length=8, packing="varlen")
    assert varlen.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 12],
        [13, 14, 15, 16, 17, 18, 0, 0],
    ]
    assert varlen.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 0, 0]]


def test_opening_tokens_follow_the_policy():
    texts = [[1, 5, 6], [7, 8]]
    options = {"length": 6, "bos": 1}
    added = pack(texts, packing="varlen", bos_policy="add", **options)
    assert added.input_ids.tolist() == [[1, 5, 6, 1, 7, 8]]
    dropped = pack(texts, packing="varlen", bos_policy="drop", **options)
    assert dropped.input_ids.tolist() == [[5, 6, 7, 8]]
    # One at the front of every window, none in the middle.
    joined = pack(texts, packing="concat", bos_policy="add", length=4, bos=1)
    assert joined.input_ids.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    facts = joined.describe()
    assert (facts["bos_policy"], facts["prepend_bos"], facts["packing"]) == ("add", True, "concat")


def test_special_tokens_are_seen_but_teach_nothing():
    model = tiny_model("llama")
    packed = pack([[1, 5, 6, 2], [1, 7, 2]], length=8, packing="varlen", special=(1, 2))
    assert packed.count == 3
    found = by_token(packed, rows(model, BLOCKS["llama"], packed))
    assert set(found) == {5, 6, 7}
    wanted = alone(model, BLOCKS["llama"], [1, 5, 6, 2])
    torch.testing.assert_close(torch.stack([found[5], found[6]]), wanted[1:3], rtol=1e-4, atol=1e-5)
    source = ActivationSource(model, BLOCKS["llama"], packed)
    assert source.metadata()["special_ids"] == [1, 2]
    assert source.metadata()["packing"] == "varlen"


def test_the_first_token_of_every_document_can_be_left_out():
    packed = pack(DOCUMENTS, length=8, packing="varlen")
    found = rows(tiny_model("llama"), BLOCKS["llama"], packed, skip_first=True)
    assert len(found) == sum(map(len, DOCUMENTS)) - len(DOCUMENTS)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    length=st.integers(2, 12),
    packing=st.sampled_from(["none", "concat", "varlen"]),
    add=st.booleans(),
)
def test_every_token_is_laid_once(sizes, length, packing, add):
    documents, token = [], 10
    for size in sizes:
        documents.append(list(range(token, token + size)))
        token += size
    policy = "add" if add else "keep"
    options = {"length": length, "packing": packing, "bos": 1, "bos_policy": policy}
    if token == 10:
        with pytest.raises(GossamerError, match="no tokens"):
            pack(documents, **options)
        return
    packed = pack(documents, **options)
    laid = packed.input_ids[packed.attention_mask]
    assert sorted(laid[laid != 1].tolist()) == list(range(10, token))
    assert packed.length <= length
    # Positions rise by one inside a segment and start at 0 where a new one is kept apart.
    inside = packed._continues() & packed.attention_mask
    assert bool((packed.positions[:, 1:] - packed.positions[:, :-1] == 1)[inside[:, 1:]].all())


def test_sliding_attention_that_is_too_short_is_refused():
    model = tiny_model("llama")
    model.config.sliding_window = 4
    packed = pack(DOCUMENTS, length=8, packing="varlen")
    with pytest.raises(GossamerError, match="attends to 4 tokens"):
        ActivationSource(model, BLOCKS["llama"], packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "dense"}, "packing"),
        ({"bos_policy": "maybe"}, "bos_policy"),
        ({"bos_policy": "add"}, "needs the opening token"),
        ({"length": 1}, "length"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(GossamerError, match=message) as raised:
        pack(DOCUMENTS, **{"length": 8, **options})
    assert "\n" not in str(raised.value)


class Chat:
    chat_template = "{% for m in messages %}..."
    all_special_ids = [3, 1, 1]

    def apply_chat_template(self, messages, tokenize, return_dict):
        assert tokenize
        assert not return_dict
        return [1, *(len(m["content"]) for m in messages), 3]


def test_conversations_go_through_the_models_template():
    talk = [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "abcdefg"}]
    assert chat_documents(Chat(), [talk]) == [[1, 4, 7, 3]]
    assert special_ids(Chat()) == (1, 3)
    plain = Chat()
    plain.chat_template = None
    with pytest.raises(GossamerError, match="no chat template"):
        chat_documents(plain, [talk])
