import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.interp.windows import Firings, Window, samples_of
from tests.methods.features.interp.planted import firings, sample, say


def test_marking_keeps_blanks_outside():
    window = Window((" a", " b", "c"), (0.0, 1.0, 0.0))
    assert window.active == (1,)
    assert window.text() == "a bc"
    assert window.text(window.active) == "a <<b>>c"


def test_samples_hold_firings_and_silence_and_share_no_window():
    found = sample()
    assert (len(found.shown), len(found.active), len(found.silent)) == (10, 12, 12)
    for window in (*found.shown, *found.active):
        assert len(window.words) == 8
        (at,) = window.active
        assert window.words[at] in (" w50", " w51")
    assert all(not window.active for window in found.silent)
    assert not {w.words for w in found.shown} & {w.words for w in found.active}
    assert found == sample()
    assert found != sample(seed=1)


def test_every_tenth_of_the_values_is_shown():
    ids = torch.ones(100, 4, dtype=torch.long)
    at = torch.arange(50)
    real = torch.ones_like(ids, dtype=torch.bool)
    rising = Firings(ids, real, at, at * 0 + 1, at * 0, 1.0 + at, 1)
    (found,) = samples_of(rising, [0], say, shown=10, tested=10, length=4)
    tenths = [int((max(w.values) - 1) // 5) for w in (*found.shown, *found.active)]
    assert sorted(tenths) == sorted([*range(10), *range(10)])


def test_neighbours_make_silence_hard():
    planted = firings()
    (easy,) = samples_of(planted, [0], say, shown=10, tested=12)
    (hard,) = samples_of(
        planted, [0], say, shown=10, tested=12, neighbours=torch.tensor([[1], [0]])
    )
    share = [sum(" w60" in w.words for w in s.silent) / 12 for s in (easy, hard)]
    assert share[1] == 1
    assert share[0] < 0.8


def test_padding_is_never_shown_nor_counted():
    planted = firings()
    planted.real[:, 10:] = False
    planted.real[0] = False
    (found,) = samples_of(planted, [1], say, shown=5, tested=5, length=32)
    assert all(len(w.words) == 10 for w in (*found.shown, *found.active, *found.silent))
    assert planted.alive(26) == [0, 1]
    assert planted.alive(27) == [0]
    assert 0 not in planted.of(1)[0].tolist()


def test_a_latent_that_hardly_fires_is_refused():
    planted = firings(windows=3)
    with pytest.raises(GossamerError, match="latent 1 fires in 1 windows"):
        list(samples_of(planted, [1], say))
