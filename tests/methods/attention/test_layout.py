import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.attention.install import layout_mask, layout_of
from gossamer.methods.attention.layout import Layout


def causal(batch, head, query, key):
    return key <= query


def packed(ids):
    ids = torch.tensor(ids)
    return lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k])


class TestPositions:
    def test_padding_does_not_count(self):
        padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
        layout = Layout(2, 4, 4, padding=padding)
        assert layout.position.tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1]]
        assert layout.first.tolist() == [2, 0]
        assert layout.gapless

    def test_padding_between_tokens_is_noticed(self):
        padding = torch.tensor([[1, 0, 1, 1]], dtype=torch.bool)
        layout = Layout(1, 4, 4, padding=padding)
        assert layout.position.tolist() == [[0, -1, 1, 2]]
        assert not layout.gapless

    def test_packed_sequences_start_anew(self):
        rule = packed([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
        layout = Layout(2, 5, 5, rule=rule, causal=False, regular=False)
        assert layout.position.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]]

    def test_a_chunk_counts_from_the_sequence(self):
        layout = Layout(1, 2, 6, query_offset=4)
        assert layout.query_index.tolist() == [4, 5]
        assert layout.mask()[0, 0].tolist() == [[True] * 5 + [False], [True] * 6]

    def test_dropped_keys_keep_their_index(self):
        layout = Layout(1, 1, 3, query_offset=9, key_offset=7)
        assert layout.key_index.tolist() == [7, 8, 9]
        assert layout.known == 10

    def test_a_rule_that_does_not_broadcast(self):
        def rule(batch, head, query, key):
            assert query.dim() == 0
            return key <= query

        layout = Layout(2, 3, 3, rule=rule, regular=False, elementwise=True)
        assert torch.equal(layout.mask()[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


class TestStandsForAMask:
    def test_it_answers_what_generate_and_hooks_ask(self):
        padding = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
        layout = Layout(2, 3, 3, padding=padding)
        assert layout.shape == (2, 1, 3, 3)
        assert layout.ndim == 4
        assert layout.contiguous() is layout
        moved = layout.to("cpu", non_blocking=True)
        assert torch.equal(moved.mask(), layout.mask())

    def test_computing_with_it_fails(self):
        with pytest.raises(TypeError):
            torch.ones(1, 1, 3, 3) + Layout(1, 3, 3)


class TestLayoutMask:
    def test_present_and_first_signature_agree(self):
        shared = {"batch_size": 1, "kv_length": 7, "mask_function": causal}
        new = layout_mask(q_length=2, q_offset=torch.tensor(5), **shared)
        old = layout_mask(cache_position=torch.arange(5, 7), **shared)
        assert torch.equal(new.mask(), old.mask())
        assert layout_mask(1, attention_mask=new) is new

    def test_short_padding_masks_are_padding_beyond_their_end(self):
        mask = layout_mask(1, 2, 4, mask_function=causal, attention_mask=torch.ones(1, 2).bool())
        assert mask.padding is None
        assert torch.equal(mask.mask()[0, 0], torch.ones(2, 4).tril().bool())

    def test_a_step_that_may_be_compiled_gets_plain_numbers(self):
        padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
        rule = lambda b, h, q, k: (k <= q) & (k > q - 4)  # noqa: E731
        options = {"mask_function": rule, "attention_mask": padding, "allow_is_causal_skip": False}
        mask = layout_mask(2, 1, 6, torch.tensor(4), **options)
        assert mask.dtype == torch.int64
        assert mask[:, 0, 0].tolist() == [[-1, -1, 0, 1, 2, -1], [-1, 1, 2, 3, 4, -1]]
        layout = layout_of(mask, torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 6, 4))
        assert layout.query_index.tolist() == [4]
        want = [[False, False, True, True, True, False], [False, True, True, True, True, False]]
        assert layout.mask()[:, 0, 0].tolist() == want

    def test_bidirectional_models_are_refused(self):
        with pytest.raises(GossamerError, match="causal"):
            layout_mask(1, 3, 3, mask_function=causal, allow_is_bidirectional_skip=True)

    def test_no_mask_means_causal(self):
        query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 5, 4)
        assert layout_of(None, query, key).query_offset == 3

    @pytest.mark.parametrize("additive", [False, True])
    def test_a_ready_made_mask_tells_padding_on_its_diagonal(self, additive):
        mask = torch.ones(2, 1, 4, 4).bool().tril()
        mask[1, :, :, :2] = False
        want = mask
        if additive:
            mask = torch.zeros(2, 1, 4, 4).masked_fill(~mask, torch.finfo(torch.float32).min)
        tensor = torch.zeros(2, 2, 4, 8)
        layout = layout_of(mask, tensor, tensor)
        assert layout.position.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
        assert torch.equal(layout.mask(), want)

    def test_a_ready_made_mask_over_a_cache_is_refused(self):
        query, key = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 5, 4)
        with pytest.raises(GossamerError, match="2-D"):
            layout_of(torch.ones(1, 1, 2, 5).bool(), query, key)
