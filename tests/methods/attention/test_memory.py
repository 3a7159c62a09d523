import copy

import torch
from transformers import DynamicCache, StaticCache

from gossamer.methods.attention.memory import LayerState, Memory
from tests.models.tiny import tiny_model


def filled(batch=3):
    cache, model = DynamicCache(), tiny_model("llama")
    with torch.no_grad():
        model(torch.arange(3, 3 + batch * 4).view(batch, 4), past_key_values=cache)
    return cache


def known(state, batch=3):
    state.tensors["pages"] = torch.arange(batch)[:, None].float()
    state.facts["turn"] = 2
    state.seen = 4
    return state


def test_rows_follow_the_cache():
    cache, memory = filled(), Memory()
    state = known(memory.of(cache, 0))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert state.tensors["pages"][:, 0].tolist() == [2, 0, 0]
    cache.batch_repeat_interleave(2)
    assert state.tensors["pages"][:, 0].tolist() == [2, 2, 0, 0, 0, 0]
    cache.batch_select_indices(torch.tensor([True, False, True, False, False, False]))
    assert state.tensors["pages"][:, 0].tolist() == [2, 0]
    assert cache.layers[0].keys.shape[0] == 2
    assert state.seen == 4


def test_crop_and_reset_forget():
    cache, memory = filled(), Memory()
    state = known(memory.of(cache, 0))
    cache.crop(-1)
    assert (state.seen, state.tensors, state.facts) == (0, {}, {})
    assert cache.get_seq_length() == 3
    known(state)
    cache.reset()
    assert state.seen == 0


def test_a_copied_cache_has_its_own_state():
    cache, memory = filled(), Memory()
    known(memory.of(cache, 0))
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 1, 1]))
    assert memory.of(twin, 0).tensors["pages"][:, 0].tolist() == [1, 1, 1]
    assert memory.of(cache, 0).tensors["pages"][:, 0].tolist() == [0, 1, 2]


def test_layers_get_their_class_back():
    cache, memory = filled(), Memory()
    kind = type(cache.layers[0])
    memory.of(cache, 0)
    assert isinstance(cache.layers[0], kind)
    assert type(cache.layers[0]) is not kind
    twin = copy.deepcopy(cache)
    memory.of(twin, 0)
    memory.forget()
    for held in (cache.layers[0], twin.layers[0]):
        assert type(held) is kind
        assert "gossamer_state" not in vars(held)
    cache.reorder_cache(torch.tensor([0, 1, 2]))


def test_the_same_state_every_time_and_one_per_layer():
    cache, memory = filled(), Memory()
    assert memory.of(cache, 0) is memory.of(cache, 0)
    assert memory.of(cache, 0) is not memory.of(cache, 1)
    assert memory.of(None, 0) is not memory.of(None, 0)
    assert isinstance(memory.of(cache, 99), LayerState)


def test_static_caches_too():
    model, memory = tiny_model("llama"), Memory()
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.arange(3, 7)[None], past_key_values=cache)
    state = known(memory.of(cache, 1), 1)
    cache.reset()
    assert state.seen == 0
