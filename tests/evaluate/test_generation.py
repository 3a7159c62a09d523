import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import continuations, generation_agreement
from tests.models.tiny import tiny_model

PROMPTS = [[5, 6, 7], [9, 8], [1, 2, 3], [4, 4, 4, 4]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "opt"])
def test_continuations_are_greedy(name: str):
    model = tiny_model(name)
    ours = continuations(model, PROMPTS, new_tokens=6)
    for prompt, added in zip(PROMPTS, ours, strict=True):
        # Without a cache: the whole text again for every token.
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        assert added.tolist() == ids[0, len(prompt) :].tolist()


def test_the_same_model_agrees_fully():
    model = tiny_model("llama")
    dense = continuations(model, PROMPTS, new_tokens=8)
    result = generation_agreement(model, PROMPTS, dense)
    assert (result.match, result.prefix, result.prefix_share, result.exact) == (1, 8, 1, 1)
    assert (result.prompts, result.new_tokens) == (4, 8)


def test_counts_worked_by_hand():
    model = tiny_model("llama")
    dense = continuations(model, PROMPTS, new_tokens=4)
    dense[0, 2] = (dense[0, 2] + 1) % 128  # differs at the third token only
    dense[3, 0] = (dense[3, 0] + 1) % 128  # differs at once
    result = generation_agreement(model, PROMPTS, dense)
    assert result.prefixes == (2, 4, 4, 0)
    assert result.prefix == 2.5
    assert result.prefix_share == 2.5 / 4
    assert result.match == 14 / 16
    assert result.exact == 0.5


def test_a_tensor_of_prompts_and_small_batches():
    model = tiny_model("llama")
    prompts = torch.randint(128, (5, 7), generator=torch.Generator().manual_seed(0))
    whole = continuations(model, prompts, new_tokens=5)
    assert torch.equal(whole, continuations(model, prompts, new_tokens=5, batch_size=2))


def test_bad_input():
    model = tiny_model("llama")
    with pytest.raises(GossamerError, match="at least one prompt"):
        continuations(model, [])
    with pytest.raises(GossamerError, match="at least one token"):
        continuations(model, [[1], []])
    with pytest.raises(GossamerError, match="new_tokens is 0"):
        continuations(model, [[1]], new_tokens=0)
    with pytest.raises(GossamerError, match="2 prompts need 2 dense"):
        generation_agreement(model, [[1], [2]], torch.zeros(1, 4, dtype=torch.int64))
