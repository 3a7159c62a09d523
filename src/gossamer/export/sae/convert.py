"""Convert: the weights of other tools as those of a :class:`Dictionary`, function for function.

Every converter takes what a file holds and gives a configuration and tensors that
``Dictionary.from_tensors`` takes; reconstructions are equal up to rounding.
Shapes: D = input width, M = latents.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.core import GossamerError

__all__ = ["Parts", "dictionary_learning", "gemma_scope", "sae_lens", "sparsify", "uncentred"]

Parts = tuple[dict[str, Any], dict[str, Tensor]]
"""Configuration and tensors."""

_TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def _config(architecture: str, d_in: int, d_sae: int, **more: Any) -> dict[str, Any]:
    return {"architecture": architecture, "d_in": int(d_in), "d_sae": int(d_sae), **more}


def uncentred(config: dict[str, Any], tensors: dict[str, Tensor]) -> Parts:
    """An encoder that reads x itself, as one that reads x - b_dec: biases take b_dec W_enc up."""
    shift = (tensors["b_dec"].double() @ tensors["W_enc"].double()).to(tensors["W_enc"].dtype)
    made = dict(tensors)
    if config["architecture"] == "gated":
        made["b_gate"] = made["b_gate"] + shift
        made["b_mag"] = made["b_mag"] + made["r_mag"].exp() * shift
    else:
        made["b_enc"] = made["b_enc"] + shift
    return {**config, "apply_b_dec_to_input": True}, made


def _jump(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Other tools apply ReLU beside the threshold, so one below zero acts as zero.
    return {**tensors, "threshold": tensors["threshold"].clamp_min(0)}


def sae_lens(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parts:
    """SAELens version 6: ``cfg.json`` and ``sae_weights.safetensors``.

    Raises
    ------
    GossamerError
        For activations normalised row by row, which weights cannot express.
    """
    made, state = dict(config), dict(tensors)
    # Its scale is folded into the weights before they are saved.
    if made.get("normalize_activations") == "expected_average_only_in":
        made["normalize_activations"] = "none"
    name = made.get("architecture")
    if name in _TRANSCODERS:
        made["architecture"], skip = _TRANSCODERS[name]
        if skip:
            state["W_skip"] = state["W_skip"].T.contiguous()
        made |= {"skip": skip, "apply_b_dec_to_input": False}
        if made["d_out"] is None:
            raise GossamerError("a transcoder's cfg.json lacks d_out; save it again")
    elif "d_out" not in made and not made.get("apply_b_dec_to_input", True):
        made, state = uncentred(made, state)
    return made, _jump(state) if made["architecture"] == "jumprelu" else state


def sparsify(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parts:
    """EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``; TopK, also as a transcoder."""
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise GossamerError(f"sparsify's activation {activation!r} is not read; 'topk' alone is")
    weight = tensors["encoder.weight"]
    made = _config("topk", weight.shape[1], weight.shape[0], k=int(config["k"]))
    state = {
        "W_enc": weight.T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    skip = tensors.get("W_skip")
    if config.get("transcode") or skip is not None:
        if not config.get("transcode"):
            raise GossamerError("an autoencoder with a skip is not read; only a transcoder has one")
        made |= {"d_out": state["W_dec"].shape[1], "skip": skip is not None}
        made["apply_b_dec_to_input"] = False
        if skip is not None:
            state["W_skip"] = skip.T
    return made, state


def gemma_scope(tensors: Mapping[str, Tensor]) -> Parts:
    """Gemma Scope's ``params.npz``: JumpReLU on x itself."""
    made = _config("jumprelu", *tensors["W_enc"].shape)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    return uncentred(made, _jump({name: tensors[name] for name in names}))


def dictionary_learning(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parts:
    """dictionary_learning's ``ae.pt``; the class is told by the names of its tensors.

    Codes are those of its ``encode``: in units of atoms of norm 1 where it scales them so.

    Raises
    ------
    GossamerError
        If the tensors are of no class known here.
    """
    names = set(tensors) - {"k", "threshold", "group_sizes"}
    state = dict(tensors)
    if names == {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}:
        return _linear("standard", state, state["bias"], state["encoder.bias"])
    if names == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}:
        return uncentred(*_linear("standard", state, state["decoder.bias"], state["encoder.bias"]))
    if names == {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"}:
        made, kept = _linear("topk", state, state["b_dec"], state["encoder.bias"])
        if "BatchTopK" in str(_trainer(config).get("dict_class")):
            return _threshold(made, kept, state["threshold"])
        return {**made, "k": int(state["k"])}, kept
    if names == {"W_enc", "b_enc", "W_dec", "b_dec"}:
        kept = {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        made = _config("jumprelu", *kept["W_enc"].shape)
        if "k" in state:
            return _threshold(made, kept, state["threshold"])
        made, kept = _threshold(made, kept, state["threshold"])
        return uncentred(*_unit_atoms(made, kept))
    gated = {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"}
    if names == gated:
        made, kept = _linear("gated", state, state["decoder_bias"], None)
        kept |= {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"], "r_mag": state["r_mag"]}
        return _unit_atoms(made, kept)
    raise GossamerError(
        f"no class of dictionary_learning known here has tensors {', '.join(sorted(tensors))}"
    )


def _trainer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("trainer", config)
    return inner if isinstance(inner, Mapping) else {}


def _linear(name: str, state: dict[str, Tensor], b_dec: Tensor, b_enc: Tensor | None) -> Parts:
    """Two ``nn.Linear``: weights are (M, D) and (D, M)."""
    weight = state["encoder.weight"]
    made = _config(name, weight.shape[1], weight.shape[0])
    kept = {"W_enc": weight.T, "W_dec": state["decoder.weight"].T, "b_dec": b_dec}
    return made, kept if b_enc is None else {**kept, "b_enc": b_enc}


def _threshold(made: dict[str, Any], kept: dict[str, Tensor], threshold: Tensor) -> Parts:
    """One threshold for all latents, or one each."""
    each = threshold.to(kept["W_dec"].dtype).expand(made["d_sae"]).clone()
    return {**made, "architecture": "jumprelu"}, _jump({**kept, "threshold": each})


def _unit_atoms(made: dict[str, Any], kept: dict[str, Tensor]) -> Parts:
    """The same function with atoms of norm 1 and codes that much larger."""
    norms = kept["W_dec"].norm(dim=1)
    state = {**kept, "W_dec": kept["W_dec"] / norms[:, None]}
    if made["architecture"] == "gated":
        # The gate keeps its scale: only the magnitude grows.
        state["r_mag"] = kept["r_mag"] + norms.log()
        state["b_mag"] = kept["b_mag"] * norms
        return made, state
    for name in ("W_enc", "b_enc", "threshold"):
        state[name] = kept[name] * norms
    return made, state
