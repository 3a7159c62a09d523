"""No map of a prompt's square: a tripwire on every tensor that any method makes.

Parts of a mask may be held up to a limit (``MEMO``), and tests are short. So the limits are lowered
until a prompt of 2048 tokens stands to it as one of 131072 does to the real one, and nothing of
T * T bytes, one bool a pair, may appear.
"""

import importlib
import pkgutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import gossamer.methods.attention as family
from gossamer import methods
from gossamer.methods.attention import layout as layouts
from gossamer.methods.attention.base import AttentionMethod
from gossamer.methods.attention.executor import Call
from gossamer.methods.attention.executors import run
from gossamer.methods.attention.index import FullIndex, WindowIndex
from gossamer.methods.attention.layout import MEMO, Layout
from gossamer.models import Tokens

LENGTH = 2048
LIMITS = {"MEMO": 1 << 14, "_HELD": 1 << 18, "_SCORES": 1 << 14, "_ROWS": 32}
KEYS = [k for k in methods.keys("attention") if issubclass(methods.get(k), AttentionMethod)]

# Quick plans at block sizes of use; "example" is cut to tiny texts.
PARAMETERS = {
    "blasst": {"threshold": 0.001, "block_size": 64},
    "hisa": {"steps": 0, "heads": 2, "width": 8, "budget_tokens": 64, "block_size": 64},
    "masformer": {"steps": 0},
    "moa": {"sink": 4, "block_size": 8, "answer_tokens": 4, "lengths": (96, 192)},
    "oracle_top_k": {"block_size": 64},
    "oracle_top_p": {"block_size": 64},
    "random_keys": {"block_size": 64},
    "s2_attention": {"steps": 0},
    "sparse_frontier": {**methods.get("sparse_frontier").example, "base": "minference"},
    "tidal_decode": {"dense_layers": 0, "correction": 0},
}


class Tripwire(TorchDispatchMode):
    """The largest storage of any tensor made inside, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.what = 0, ""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > self.bytes:
                self.bytes = x.untyped_storage().nbytes()
                self.what = f"{op} made {tuple(x.shape)} of {x.dtype}"
        return out


@pytest.fixture
def lowered(monkeypatch):
    assert LENGTH**2 // LIMITS["MEMO"] == 131072**2 // MEMO
    for found in pkgutil.walk_packages(family.__path__, f"{family.__name__}."):
        module = importlib.import_module(found.name)
        for name, value in LIMITS.items():
            if isinstance(getattr(module, name, None), int):
                monkeypatch.setattr(module, name, value)
    held = layouts.MEMO
    assert held == LIMITS["MEMO"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def ids(rows, length):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_prompts_and_tokens_after_them(key, model, lowered):
    method = methods.make(key, **PARAMETERS.get(key, {}))
    with torch.enable_grad():
        work = method.apply(model, Tokens.from_ids(ids(6, 256)))
    with work, Tripwire() as wire:
        out = model(ids(1, LENGTH), use_cache=True, logits_to_keep=1)
        model(ids(1, 1), past_key_values=out.past_key_values, use_cache=True)
    assert wire.bytes < LENGTH**2, wire.what
    assert sum(work.ran.values()) == 4
    # The definition and uncompiled FlexAttention write scores out.
    assert not {"reference", "flex"} & set(work.ran), work.ran


@pytest.mark.parametrize("name", ["reference", "masked", "dense"])
def test_masks_are_made_in_parts(name, lowered):
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, LENGTH, 8, generator=g) for heads in (2, 1))
    padding = torch.ones(1, LENGTH, dtype=torch.bool)
    padding[:, :9] = False
    layout = Layout(1, LENGTH, LENGTH, padding=padding)
    index = FullIndex(layout) if name == "dense" else WindowIndex(layout, 4, 100)
    with Tripwire() as wire:
        run(name, Call(query, key, key), index)
        index.pairs()
    assert wire.bytes < LENGTH**2, wire.what


def test_the_tripwire_is_there():
    with Tripwire() as wire:
        Layout(1, LENGTH, LENGTH).mask()
    assert wire.bytes >= LENGTH**2
