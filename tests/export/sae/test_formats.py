"""Dictionaries to and from other tools' files, against their formulas and, where installed, them.

``pip install gossamer[interop]`` brings sae-lens; without it its tests are skipped.
"""

import importlib
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gossamer.core import GossamerError
from gossamer.export.sae import read_dictionary, write_dictionary
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.rules import AbsTopK, Gated, JumpReLU, ReLU, TopK

D, M = 12, 40
RULES = {
    "topk": lambda: TopK(5),
    "standard": ReLU,
    "jumprelu": lambda: JumpReLU(M, initial=0.3),
    "gated": lambda: Gated(M),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(rule="topk", *, d_out=None, skip=False):
    found = Dictionary.random(D, M, RULES[rule](), seed=1, tied=False, d_out=d_out, skip=skip)
    with torch.no_grad():
        for at, parameter in enumerate(found.parameters()):
            if parameter.dim() == 1 and parameter.requires_grad:
                parameter.add_(0.2 * random(*parameter.shape, seed=at).abs())
        if found.W_skip is not None:
            found.W_skip.copy_(random(*found.W_skip.shape, seed=9) / 5)
    found.metadata["model_name"] = "tiny"
    return found.eval().requires_grad_(False)


X = random(64, D, seed=5)


def near(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def package(name):
    """Another tool, if it is here; what it warns of while it is imported is its own affair."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


# -- SAELens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_saelens_files_come_back(tmp_path, rule):
    wanted = made(rule)
    found = read_dictionary(write_dictionary(wanted, tmp_path / "x"))
    assert torch.equal(found(X), wanted(X))
    assert found.metadata["model_name"] == "tiny"
    config = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == (rule, D, M)


@pytest.mark.parametrize("rule", RULES)
def test_saelens_opens_what_is_written(tmp_path, rule):
    lens = package("sae_lens")
    wanted = made(rule)
    found = lens.SAE.load_from_disk(write_dictionary(wanted, tmp_path / "x"))
    near(found.encode(X).detach(), wanted.encode(X).to_dense())
    near(found(X).detach(), wanted(X))


@pytest.mark.parametrize(("rule", "skip"), [("standard", False), ("jumprelu", True)])
def test_saelens_opens_transcoders(tmp_path, rule, skip):
    lens = package("sae_lens")
    wanted = made(rule, d_out=7, skip=skip)
    folder = write_dictionary(wanted, tmp_path / "x")
    near(lens.SAE.load_from_disk(folder)(X).detach(), wanted(X))
    assert torch.equal(read_dictionary(folder)(X), wanted(X))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
        ("TopKSAE", {"k": 4, "apply_b_dec_to_input": False}),
        ("StandardSAE", {"apply_b_dec_to_input": False}),
        ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
        ("JumpReLUSAE", {"normalize_activations": "expected_average_only_in"}),
        ("GatedSAE", {"apply_b_dec_to_input": False}),
        ("Transcoder", {"d_out": 7, "apply_b_dec_to_input": False}),
        ("SkipTranscoder", {"d_out": 7, "apply_b_dec_to_input": False}),
    ],
)
def test_what_saelens_writes_is_read(tmp_path, name, options):
    lens = package("sae_lens")
    kind = getattr(lens, name)
    theirs = kind(getattr(lens, f"{name}Config")(d_in=D, d_sae=M, **options))
    with torch.no_grad():
        for at, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.4 * random(*parameter.shape, seed=at))
    theirs.save_model(tmp_path / "x")
    found = read_dictionary(tmp_path / "x")
    near(found(X), theirs(X).detach())
    near(found.encode(X).to_dense(), theirs.encode(X).detach())


def test_saelens_has_no_such_dictionary(tmp_path):
    signed = Dictionary.random(D, M, AbsTopK(3), seed=0)
    with pytest.raises(GossamerError, match="SAELens has no abstopk"):
        write_dictionary(signed, tmp_path / "x")
    with pytest.raises(GossamerError, match="no topk transcoder; write form 'sparsify'"):
        write_dictionary(made(d_out=D), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_activations_normalised_by_row_are_refused(tmp_path):
    folder = write_dictionary(made(), tmp_path / "x")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "layer_norm"}))
    with pytest.raises(GossamerError, match="layer_norm"):
        read_dictionary(folder)


# -- sparsify ------------------------------------------------------------------------------------


def sparsify_forward(state, config, x):
    read = x if config["transcode"] else x - state["b_dec"]
    pre = torch.relu(read @ state["encoder.weight"].T + state["encoder.bias"])
    values, at = pre.topk(config["k"])
    out = torch.zeros_like(pre).scatter(1, at, values) @ state["W_dec"] + state["b_dec"]
    return out + x @ state["W_skip"].T if "W_skip" in state else out


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_both_ways(tmp_path, transcode):
    config = {"k": 4, "d_in": D, "transcode": transcode, "activation": "topk"}
    config |= {"num_latents": M, "skip_connection": transcode, "expansion_factor": 0}
    state = {
        "encoder.weight": random(M, D, seed=1),
        "encoder.bias": random(M, seed=2) / 3,
        "W_dec": random(M, D, seed=3),
        "b_dec": random(D, seed=4),
    }
    if transcode:
        state["W_skip"] = random(D, D, seed=6)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "sae.safetensors")
    found = read_dictionary(tmp_path)
    near(found(X), sparsify_forward(state, config, X))
    folder = write_dictionary(found, tmp_path / "again", form="sparsify")
    assert torch.equal(read_dictionary(folder)(X), found(X))
    written = json.loads((folder / "cfg.json").read_text())
    assert (written["k"], written["transcode"]) == (4, transcode)


def test_sparsify_opens_what_is_written(tmp_path):
    coder = package("sparsify").SparseCoder
    for name, skip in (("plain", False), ("through", True)):
        wanted = made(d_out=D if skip else None, skip=skip)
        folder = write_dictionary(wanted, tmp_path / name, form="sparsify")
        near(coder.load_from_disk(folder)(X).sae_out.detach(), wanted(X))


def test_what_sparsify_lacks(tmp_path):
    with pytest.raises(GossamerError, match="TopK dictionaries of one width only"):
        write_dictionary(made("gated"), tmp_path / "x", form="sparsify")
    with pytest.raises(GossamerError, match="form"):
        write_dictionary(made(), tmp_path / "x", form="onnx")
    folder = write_dictionary(made(), tmp_path / "y", form="sparsify")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "activation": "groupmax"}))
    with pytest.raises(GossamerError, match="groupmax"):
        read_dictionary(folder)


# -- dictionary_learning -------------------------------------------------------------------------


def linear(seed=0):
    return {
        "encoder.weight": random(M, D, seed=seed),
        "encoder.bias": random(M, seed=seed + 1) / 3,
        "decoder.weight": random(D, M, seed=seed + 2),
    }


def matrices(seed=0):
    return {
        "W_enc": random(D, M, seed=seed),
        "b_enc": random(M, seed=seed + 1) / 3,
        "W_dec": random(M, D, seed=seed + 2),
        "b_dec": random(D, seed=seed + 3),
    }


def plain(s, x):
    code = torch.relu((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"])
    return code, code @ s["decoder.weight"].T + s["bias"]


def april(s, x):
    code = torch.relu(x @ s["encoder.weight"].T + s["encoder.bias"])
    return code, code @ s["decoder.weight"].T + s["decoder.bias"]


def top(s, x):
    pre = torch.relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    values, at = pre.topk(int(s["k"]))
    code = torch.zeros_like(pre).scatter(1, at, values)
    return code, code @ s["decoder.weight"].T + s["b_dec"]


def batch_top(s, x):
    pre = torch.relu((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"])
    code = pre * (pre > s["threshold"])
    return code, code @ s["decoder.weight"].T + s["b_dec"]


def matryoshka(s, x):
    pre = torch.relu((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"])
    code = pre * (pre > s["threshold"])
    return code, code @ s["W_dec"] + s["b_dec"]


def jump(s, x):
    pre = x @ s["W_enc"] + s["b_enc"]
    code = torch.relu(pre * (pre > s["threshold"]))
    return code * s["W_dec"].norm(dim=1), code @ s["W_dec"] + s["b_dec"]


def gated(s, x):
    u = (x - s["decoder_bias"]) @ s["encoder.weight"].T
    loud = torch.relu(s["r_mag"].exp() * u + s["mag_bias"])
    code = (u + s["gate_bias"] > 0) * loud
    norms = s["decoder.weight"].norm(dim=0)
    return code * norms, code @ s["decoder.weight"].T + s["decoder_bias"]


BIAS = {"b_dec": random(D, seed=7)}
LEARNED = {
    "AutoEncoder": (plain, linear() | {"bias": random(D, seed=7)}),
    "AutoEncoderNew": (april, linear() | {"decoder.bias": random(D, seed=7)}),
    "AutoEncoderTopK": (
        top,
        linear() | BIAS | {"k": torch.tensor(4), "threshold": torch.tensor(0.5)},
    ),
    "BatchTopKSAE": (
        batch_top,
        linear() | BIAS | {"k": torch.tensor(4), "threshold": torch.tensor(0.5)},
    ),
    "untrained BatchTopKSAE": (
        batch_top,
        linear() | BIAS | {"k": torch.tensor(4), "threshold": torch.tensor(-1.0)},
    ),
    "MatryoshkaBatchTopKSAE": (
        matryoshka,
        matrices() | {"k": torch.tensor(4), "threshold": torch.tensor(0.7)},
    ),
    "JumpReluAutoEncoder": (jump, matrices() | {"threshold": random(M, seed=8)}),
    "GatedAutoEncoder": (
        gated,
        {n: t for n, t in linear().items() if n != "encoder.bias"}
        | {
            "decoder_bias": random(D, seed=4),
            "r_mag": random(M, seed=5) / 3,
            "gate_bias": random(M, seed=6),
            "mag_bias": random(M, seed=7),
        },
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_dictionary_learning_is_read(tmp_path, name):
    forward, state = LEARNED[name]
    torch.save(state, tmp_path / "ae.pt")
    config = {"trainer": {"dict_class": name.split()[-1], "activation_dim": D, "dict_size": M}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_dictionary(tmp_path)
    code, wanted = forward(state, X)
    torch.testing.assert_close(found(X), wanted, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.encode(X).to_dense(), code, rtol=1e-5, atol=2e-5)
    assert found.metadata["read_from"] == "dictionary_learning"


def test_tensors_of_no_known_class_are_named(tmp_path):
    torch.save({"weight": torch.ones(3, 3)}, tmp_path / "ae.pt")
    with pytest.raises(GossamerError, match="tensors weight"):
        read_dictionary(tmp_path)


# -- Gemma Scope ---------------------------------------------------------------------------------


def test_gemma_scope_is_read(tmp_path):
    state = matrices() | {"threshold": random(M, seed=8).abs()}
    np.savez(tmp_path / "params.npz", **{n: t.numpy() for n, t in state.items()})
    for source in (tmp_path, tmp_path / "params.npz"):
        found = read_dictionary(source)
        pre = X @ state["W_enc"] + state["b_enc"]
        code = torch.relu(pre) * (pre > state["threshold"])
        near(found.encode(X).to_dense(), code)
        near(found(X), code @ state["W_dec"] + state["b_dec"])


# -- files that are not read ---------------------------------------------------------------------


class Surprise:
    def __reduce__(self):
        return (print, ("run",))


def test_pickles_are_refused_in_one_line(tmp_path, capsys):
    torch.save({"encoder.weight": Surprise()}, tmp_path / "ae.pt")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Surprise()], dtype=object))
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Surprise()))
    for name in ("ae.pt", "params.npz", "x.pt"):
        with pytest.raises(GossamerError, match="pickle of more than tensors") as raised:
            read_dictionary(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert "run" not in capsys.readouterr().out


def test_missing_and_damaged_files_are_one_line(tmp_path):
    folder = write_dictionary(made(), tmp_path / "x")
    cases = {
        tmp_path / "nowhere": "does not exist",
        tmp_path: "holds x",
    }
    (tmp_path / "y.gguf").write_bytes(b"")
    cases[tmp_path / "y.gguf"] = "no tool known here"
    (tmp_path / "z.npz").write_bytes(b"PK nothing")
    cases[tmp_path / "z.npz"] = r"cannot be read|pickle"
    for source, message in cases.items():
        with pytest.raises(GossamerError, match=message) as raised:
            read_dictionary(source)
        assert "\n" not in str(raised.value)
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    with pytest.raises(GossamerError, match="cannot be read"):
        read_dictionary(folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "d_sae": M + 1}))
    with pytest.raises(GossamerError, match="do not fit"):
        read_dictionary(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(GossamerError, match="not a configuration"):
        read_dictionary(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(GossamerError, match="cannot be read"):
        read_dictionary(folder)


def test_a_dictionary_of_another_width_says_so(tmp_path):
    found = read_dictionary(write_dictionary(made(), tmp_path / "x"))
    with pytest.raises(GossamerError, match=f"reads {D} channels; the activations have 5"):
        found(torch.ones(2, 5))
