from itertools import count

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.evaluate import Rate, speed
from gossamer.evaluate.environment import device_name
from tests.models.tiny import tiny_model


class Clock:
    """Seconds that pass as told, one number for each call."""

    def __init__(self, *steps: float) -> None:
        self.now, self.steps = 0.0, iter(steps)

    def __call__(self) -> float:
        self.now += next(self.steps)
        return self.now


def test_rates_from_a_known_clock():
    # Begin, end of prefill, end of decode of a warm-up and three counted runs.
    clock = Clock(0, 90, 90, 0, 2, 4, 0, 1, 8, 0, 4, 2)
    result = speed(
        tiny_model("llama"), prompt_tokens=10, new_tokens=4, batch=2, repeats=3, clock=clock
    )
    assert result.prefill.runs == (10.0, 20.0, 5.0)
    assert (result.prefill.median, result.prefill.low, result.prefill.high) == (10, 5, 20)
    assert result.prefill.iqr == 7.5
    assert result.decode.runs == (2.0, 1.0, 4.0)
    assert result.decode.median == 2.0
    assert (result.batch, result.repeats, result.warmup) == (2, 3, 1)
    assert (result.threads, result.device) == (torch.get_num_threads(), device_name())
    assert result.dtype == "float32"
    assert "3 runs after 1 of warm-up" in str(result)


def test_every_run_reads_the_prompt_and_decodes_with_a_cache():
    model = tiny_model("llama")
    widths: list[int] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: widths.append(args[0].shape[1])
    )
    speed(model, prompt_tokens=6, new_tokens=3, repeats=2, warmup=1, clock=lambda: 0.0)
    hook.remove()
    assert widths == [6, 1, 1, 1] * 3


def test_decode_leaves_the_prefill_out():
    ticks = count()
    result = speed(
        tiny_model("gpt2"), prompt_tokens=4, new_tokens=2, repeats=1, warmup=0,
        clock=lambda: float(next(ticks)),
    )  # fmt: skip
    assert result.prefill.runs == (4.0,)
    assert result.decode.runs == (2.0,)
    assert result.decode.iqr == 0.0


def test_rate_is_json_able_and_prints():
    rate = Rate.of(100, [1.0, 2.0, 4.0])
    assert rate.median == 50
    assert str(rate) == "50.0 tokens/s (25.0 to 100.0)"


@pytest.mark.parametrize(
    "bad", [{"repeats": 0}, {"new_tokens": 0}, {"batch": 0}, {"prompt_tokens": 1.5}, {"warmup": -1}]
)
def test_bad_counts(bad: dict):
    with pytest.raises(GossamerError, match=next(iter(bad))):
        speed(tiny_model("llama"), **bad)
