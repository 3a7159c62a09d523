"""What the methods share: parameters refused before anything runs, and what files remember."""

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.abstopk import AbsTopK
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.batch_topk_sae import BatchTopKSAE
from gossamer.methods.features.gated_sae import GatedSAE
from gossamer.methods.features.gradient_sae import GradientSAE
from gossamer.methods.features.jumprelu_sae import JumpReLUSAE
from gossamer.methods.features.matryoshka_sae import MatryoshkaSAE
from gossamer.methods.features.mutual_choice import MutualChoice
from gossamer.methods.features.relu_sae import ReLUSAE
from gossamer.methods.features.top_afa import TopAFA
from gossamer.methods.features.topk_sae import TopKSAE
from tests.methods.features.test_fast_sae import tokens
from tests.models.tiny import tiny_model

SHARED = {"width": 64, "tokens": 512, "batch_size": 64, "lr": 5e-3}
METHODS = [
    ReLUSAE(**SHARED),
    GatedSAE(**SHARED),
    JumpReLUSAE(target_l0=4.0, **SHARED),
    TopKSAE(k=4, multi=True, **SHARED),
    BatchTopKSAE(k=4, **SHARED),
    MatryoshkaSAE(k=4, **SHARED),
    MutualChoice(k=4, **SHARED),
    MutualChoice(k=4, choice="mutual", **SHARED),
    AbsTopK(k=4, **SHARED),
    TopAFA(**SHARED),
    GradientSAE(k=4, **SHARED),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.key())
def test_fitted_dictionaries_come_back_from_their_files(method, tmp_path):
    made = method.fit(tiny_model("llama"), tokens())
    back = Dictionary.load(made.save(tmp_path / "sae")).eval()
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back(x), made(x))
    assert back.metadata["method"]["method"] == method.key()
    with pytest.raises(GossamerError, match="reads 32 channels"):
        made.encode(torch.zeros(1, 31))
    with pytest.raises(GossamerError, match="NaN"):
        made.encode(torch.full((1, 32), float("nan")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReLUSAE(coefficient=-1.0), "coefficient"),
        (lambda: GatedSAE(coefficient=float("inf")), "coefficient"),
        (lambda: JumpReLUSAE(target_l0=-1.0), "target_l0"),
        (lambda: JumpReLUSAE(target_l0=65.0, width=64), "64 latents allow"),
        (lambda: JumpReLUSAE(bandwidth=-1.0), "bandwidth"),
        (lambda: BatchTopKSAE(k=65, width=64), "k is 65, above the width 64"),
        (lambda: AbsTopK(k=0), "k is 0"),
        (lambda: AbsTopK(hook=3), "hook is 3; give a module's path"),
        (lambda: MatryoshkaSAE(fractions=(0.5,)), "sum to 1"),
        (lambda: MutualChoice(choice="both"), "unknown choice"),
        (lambda: MutualChoice(prior="flat"), "unknown prior"),
        (lambda: MutualChoice(tau=2.0), "tau"),
        (lambda: TopAFA(gamma=-1.0), "gamma"),
        (lambda: TopAFA(aux_k=-1), "aux_k"),
        (lambda: GradientSAE(beta=-1.0), "beta"),
    ],
)
def test_impossible_parameters_are_refused(make, message):
    with pytest.raises(GossamerError, match=message):
        make()


def test_penalties_rise_over_a_twentieth_of_the_run():
    assert ReLUSAE(tokens=1000).rule().warmup == 50
    assert JumpReLUSAE(tokens=1000, width=64).rule().warmup == 50
