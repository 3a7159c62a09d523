import pytest
import torch

from gossamer.claims.base import Verdict
from gossamer.claims.features.dark_matter import CLAIMS
from gossamer.core import GossamerError
from gossamer.methods.features.dark_matter import DarkMatter
from gossamer.models import Tokens
from tests.models.tiny import tiny_model

METHOD = DarkMatter(k=2, width=64, tokens=2048, batch_size=128, lr=5e-3, sink_multiple=None)
TOKENS = Tokens.from_ids(
    torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(0))
)


def hidden(model):
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(input_ids=TOKENS.input_ids[:3])
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def outputs():
    """What the spliced block hands on, by part of the error put back; None for the model's own."""
    model = tiny_model("llama")
    found = {None: hidden(model)}
    for part in ("none", "linear", "nonlinear"):
        method = DarkMatter(**{**vars(METHOD), "put_back": part})
        with method.apply(model, TOKENS):
            found[part] = hidden(model)
    return found


def test_parts_of_the_error_add_up_in_the_model():
    found = outputs()
    whole = found["linear"] + found["nonlinear"] - found["none"]
    torch.testing.assert_close(whole, found[None], rtol=1e-3, atol=1e-4)
    assert (found["linear"] - found[None]).norm() < (found["none"] - found[None]).norm()


def test_the_report_tells_the_split():
    with METHOD.apply(tiny_model("llama"), TOKENS) as applied:
        text = str(applied.report())
        assert "put back: linear" in text
        assert "R²" in text
        assert applied.split["nonlinear_fvu"] < applied.split["fvu"]
    few = Tokens.from_ids(TOKENS.input_ids[:2])
    with METHOD.apply(tiny_model("llama"), few) as applied:
        assert "rows are few for a map of 32 channels" in str(applied.report())


def test_any_dictionary_can_be_split():
    model = tiny_model("llama")
    made = METHOD.fit(model, TOKENS)
    split = METHOD.split(model, TOKENS, made)
    assert split.held == split.fitted == 144
    assert 0 < split.fvu < 1


def test_an_unknown_part_is_refused():
    with pytest.raises(GossamerError, match="put_back is 'half'"):
        DarkMatter(put_back="half")


def test_claims_fail_for_figures_of_a_stub():
    pursuit, brief, full = CLAIMS
    good = {"fvu_pursuit": 0.09, "fvu_encoder": 0.1, "fvu_random": 0.5}
    good |= {"l0_pursuit": 3.0, "l0_encoder": 3.0}
    assert pursuit.check([good]) is Verdict.HOLDS
    assert pursuit.check([good | {"fvu_pursuit": 0.099}]) is Verdict.WEAKER
    assert pursuit.check([good | {"l0_pursuit": 4.0}]) is Verdict.FAILS
    assert pursuit.check([good | {"fvu_pursuit": 0.1}]) is Verdict.FAILS
    good = {"error_r2": 0.5, "norm_r2": 0.8, "shuffled_r2": -0.1, "shuffled_norm_r2": 0.0}
    for claim in (brief, full):
        assert claim.check([good]) is Verdict.HOLDS
        assert claim.check([good | {"norm_r2": 0.5}]) is Verdict.WEAKER
        assert claim.check([good | {"shuffled_r2": 0.1}]) is Verdict.FAILS
        assert claim.check([good | {"error_r2": 0.0}]) is Verdict.FAILS
