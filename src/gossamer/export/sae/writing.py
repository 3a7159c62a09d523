"""Writing: a dictionary in the files that SAELens or sparsify open."""

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from gossamer.core import GossamerError, unknown
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.models.store import atomic_folder, write_json

__all__ = ["write_dictionary"]

_FORMATS = ("saelens", "sparsify")
_LENS = ("standard", "topk", "jumprelu", "gated")
_TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}


def write_dictionary(
    dictionary: Dictionary,
    folder: str | Path,
    *,
    form: Literal["saelens", "sparsify"] = "saelens",
) -> Path:
    """Write a dictionary for another tool; the folder appears whole or not at all.

    Parameters
    ----------
    form : ``saelens``: version 6, ``cfg.json`` and ``sae_weights.safetensors``. ``sparsify``:
        ``cfg.json`` and ``sae.safetensors``, for TopK autoencoders and transcoders.

    Raises
    ------
    GossamerError
        If the tool has no such dictionary, or the folder holds something or cannot be written.
    """
    if form not in _FORMATS:
        raise unknown("form", form, _FORMATS)
    config, tensors, weights = _lens(dictionary) if form == "saelens" else _sparsify(dictionary)
    with atomic_folder(folder) as part:
        own = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(own, part / weights)
        write_json(part / "cfg.json", config)
    return Path(folder)


def _lens(made: Dictionary) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    config, tensors = made.config(), made.tensors()
    name = config["architecture"]
    if name not in _LENS or config.get("signed"):
        raise GossamerError(
            f"SAELens has no {'signed ' if config.get('signed') else ''}{name} dictionary; save "
            "with dictionary.save, which gossamer reads"
        )
    if made.transcoder:
        known = _TRANSCODERS.get((name, made.W_skip is not None))
        if known is None:
            raise GossamerError(
                f"SAELens has no {name} transcoder; write form 'sparsify', which has"
            )
        config["architecture"] = known
        config.pop("skip")
        if made.W_skip is not None:
            tensors["W_skip"] = tensors["W_skip"].T
    if name == "topk":
        # Latents are ranked as they are, whatever the norms of their atoms.
        config["rescale_acts_by_decoder_norm"] = False
    return config, tensors, "sae_weights.safetensors"


def _sparsify(made: Dictionary) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    config, tensors = made.config(), made.tensors()
    if config["architecture"] != "topk" or (made.transcoder and made.d_out != made.d_in):
        raise GossamerError(
            f"sparsify has TopK dictionaries of one width only, not {config['architecture']} of "
            f"{made.d_in} to {made.d_out}; write form 'saelens'"
        )
    own = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if made.W_skip is not None:
        own["W_skip"] = tensors["W_skip"].T
    written = {
        "activation": "topk",
        "expansion_factor": made.d_sae // made.d_in,
        "normalize_decoder": not made.transcoder,
        "num_latents": made.d_sae,
        "k": config["k"],
        "multi_topk": False,
        "skip_connection": made.W_skip is not None,
        "transcode": made.transcoder,
        "d_in": made.d_in,
    }
    return written, own, "sae.safetensors"
