"""What every test relies on: one thread, no network, and nothing left behind."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

# Small operations on two busy threads can take ten times as long as on one.
torch.set_num_threads(1)

settings.register_profile("gossamer", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("gossamer")


@pytest.fixture(autouse=True)
def _attention_tables_unchanged():
    """No test may leave an attention implementation registered."""
    before = set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())
    yield
    after = set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())
    assert after == before
