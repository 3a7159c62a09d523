import pytest

from gossamer.core import GossamerError
from gossamer.methods.features.interp.cost import Cost, estimate
from gossamer.methods.features.interp.judges import WordEmbedder, WordJudge
from gossamer.methods.features.interp.scores import (
    detection,
    embedding,
    explain,
    fuzzing,
    questions,
    surprisal,
)
from tests.methods.features.interp.planted import sample

RIGHT, WRONG = "w50, w51", "w999"


class Fixed(WordJudge):
    """Answers every prompt alike, and counts."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def complete(self, prompts, *, max_tokens):
        self.asked += prompts
        return [self.answer] * len(prompts)


def test_the_judge_names_the_marked_words():
    (told,) = explain(WordJudge(), [sample()])
    assert sorted(told.split(", ")) == ["w50", "w51"]


@pytest.mark.parametrize("score", [detection, fuzzing])
@pytest.mark.parametrize("per_prompt", [1, 5])
def test_right_words_are_told_from_wrong_ones(score, per_prompt):
    assert score(WordJudge(), RIGHT, sample(), per_prompt=per_prompt).value == 1
    found = score(WordJudge(), WRONG, sample(), per_prompt=per_prompt)
    assert found.value == 0.5
    assert found.asked == found.answered


def test_half_right_words_score_between():
    assert 0.6 < detection(WordJudge(), "w50", sample()).value < 0.9


def test_surprisal_and_embedding_rank_by_the_explanation():
    assert surprisal(WordJudge(), RIGHT, sample()).value == 1
    assert surprisal(WordJudge(), WRONG, sample()).value == pytest.approx(0.5)
    assert embedding(WordEmbedder(), RIGHT, sample()).value == 1
    assert embedding(WordEmbedder(), WRONG, sample()).value == pytest.approx(0.5)


def test_fuzzing_marks_as_many_tokens_and_half_of_them_truly():
    prompts, truths = questions("fuzzing", RIGHT, sample(), per_prompt=1)
    assert sum(t for (t,) in truths) == 6
    for prompt, (true,) in zip(prompts, truths, strict=True):
        text = prompt.split("Text 1: ")[1]
        assert text.count("<<") == 1
        assert ("<<w50>>" in text or "<<w51>>" in text) == true


def test_detection_shows_no_marks():
    prompts, _ = questions("detection", RIGHT, sample())
    assert not any("<<" in prompt.split("Text 1: ")[1] for prompt in prompts)


def test_a_judge_that_always_says_yes_is_at_chance_and_one_that_babbles_is_refused():
    assert detection(Fixed("[1]"), RIGHT, sample(), per_prompt=1).value == 0.5
    with pytest.raises(GossamerError, match="answered 0 in the form"):
        detection(Fixed("well"), RIGHT, sample())


def test_unreadable_answers_are_counted_and_left_out():
    class Half(WordJudge):
        def complete(self, prompts, *, max_tokens):
            full = super().complete(prompts, max_tokens=max_tokens)
            return [a if i % 2 else "hm" for i, a in enumerate(full)]

    found = detection(Half(), RIGHT, sample(), per_prompt=2)
    assert (found.value, found.asked, found.answered) == (1, 24, 12)


def test_cost_is_what_will_be_asked():
    judge, one = Fixed("[1, 1, 1, 1, 1]"), sample()
    cost = estimate([one], ("detection", "fuzzing", "embedding"), per_prompt=6)
    explain(judge, [one])
    judge.answer = "[1, 1, 1, 1, 1, 1]"
    told = "x" * 256
    detection(judge, told, one, per_prompt=6)
    fuzzing(judge, told, one, per_prompt=6)
    assert cost.calls == len(judge.asked) == 1 + 4 + 2
    assert cost.read == sum(-(-len(prompt) // 4) for prompt in judge.asked)
    assert cost.written == 7 * 64
    assert cost.price(2.0, 10.0) == pytest.approx((2 * cost.read + 10 * cost.written) / 1e6)
    assert "7 calls" in str(cost)
    assert estimate([one], ("surprisal",)).calls == 1 + 2 * 24
    assert cost + Cost(1, 2, 3) == Cost(8, cost.read + 2, cost.written + 3)
