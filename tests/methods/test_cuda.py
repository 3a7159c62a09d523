"""Every method on a GPU: it works there, agrees with the CPU, and leaves no trace."""

import pytest
import torch

from gossamer import methods
from gossamer.recipes.compare import compare
from tests.methods.test_conformance import assert_untouched, example, snapshot
from tests.models.subjects import random_tokens
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


LANGUAGE = [key for key in methods.keys() if methods.get(key).subject == "language model"]


@pytest.mark.parametrize("key", LANGUAGE)
def test_every_method_agrees_with_the_cpu(key):
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        before = snapshot(model)
        with example(key).apply(model, random_tokens()) as applied:
            with torch.no_grad():
                ids = random_tokens(7).input_ids[:3].to(device)
                results.append(model(input_ids=ids).logits.cpu())
            assert applied.report().rows
        assert_untouched(model, before)
    trains = getattr(example(key), "steps", 0) or methods.get(key).card.family == "features"
    if trains:
        # Trained on each device in its own arithmetic: alike, not equal.
        assert torch.isfinite(results[1]).all()
    else:
        assert torch.allclose(*results, atol=2e-3)


def test_a_comparison_runs_on_the_gpu():
    names = ["magnitude", "lamp", "wanda", "wanda:pattern=2:4", "teal", "streaming_llm"]
    options = {"samples": 4, "length": 128, "windows": 4, "timed": False, "dtype": "float32"}
    cpu = compare("nano", names, sparsity=0.5, **options)
    gpu = compare("nano", names, sparsity=0.5, device="cuda", **options)
    for a, b in zip(cpu, gpu, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.05)
