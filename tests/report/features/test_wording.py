import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gossamer.models import load_model
from gossamer.report.features import Unembedding, Vocabulary
from tests.models.tiny import tiny_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "gpt_neox"])
def test_logits_are_those_of_the_model_up_to_one_factor(name: str):
    model = tiny_model(name).double()
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        for parameter in norm.parameters():
            parameter.data.uniform_(0.3, 1.4, generator=generator)
    unembedding = Unembedding.of(model, 32)
    assert unembedding is not None
    atoms = torch.randn(3, 32, dtype=torch.float64, generator=generator)
    found = unembedding(atoms)
    # The last norm and head themselves, at some point, for a small step of an atom.
    last = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
            "opt": "model.decoder.final_layer_norm"}.get(name, "model.norm")  # fmt: skip
    norm, head = model.get_submodule(last), model.get_output_embeddings()
    point = torch.randn(32, dtype=torch.float64, generator=generator)
    point -= point.mean()
    for atom, change in zip(atoms, found, strict=True):
        # Across the point and the constant, a step leaves the norm's scale as it is.
        frame = torch.linalg.qr(torch.stack([point, torch.ones(32).double()], 1)).Q
        step = atom - frame @ (frame.T @ atom)
        with torch.no_grad():
            moved = head(norm(point + 1e-2 * step)) - head(norm(point))
        expected = unembedding(step[None])[0].double()
        assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 1 - 1e-4
        assert float((moved * expected).sum()) > 0
        assert change.shape == (128,)


def test_a_centring_norm_forgets_the_mean_and_another_does_not():
    ones = torch.ones(1, 32)
    centring = Unembedding.of(tiny_model("gpt2"), 32)
    other = Unembedding.of(tiny_model("llama"), 32)
    assert centring is not None
    assert other is not None
    assert float(centring(ones).abs().max()) == 0
    assert float(other(ones).abs().max()) > 0.1


def test_a_model_without_a_fitting_head_has_no_logits():
    assert Unembedding.of(tiny_model("llama"), 31) is None
    assert Unembedding.of(tiny_model("bert"), 32) is None
    assert Unembedding.of(torch.nn.Linear(32, 4), 32) is None


def test_byte_level_tokens_keep_their_spaces():
    tokenizer = load_model("nano").tokenizer
    vocabulary = Vocabulary(tokenizer)
    text = "def f(x):\n        return x  # one"
    words = vocabulary(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(words) == text
    assert any(word.startswith(" ") for word in words)
    parts = vocabulary(tokenizer("\u2603", add_special_tokens=False)["input_ids"])
    assert len(parts) > 1
    assert set("".join(parts)) == {"\ufffd"}


def test_word_pieces_and_sentence_pieces():
    words = ["[UNK]", "play", "##ing", "ball"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    pieces = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"))
    assert "".join(pieces([1, 2, 3])) == " playing ball"
    words = ["<unk>", "▁play", "ing", "▁ball"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
    assert "".join(pieces([1, 2, 3])) == " playing ball"


def test_a_list_is_a_vocabulary():
    assert Vocabulary(["a", "b"])([1, 0, 5]) == ("b", "a", "<5>")
