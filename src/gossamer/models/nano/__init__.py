"""nano: a small Llama-style language model of Python source, shipped inside the package.

Every claim and example needs a real trained model that is there without a network. This folder
holds one (``weights/``), two texts to calibrate and to measure it with (``texts/``), and the
script that made them (``train.py``). Importing this module loads neither torch nor transformers.
"""

import gzip
from pathlib import Path

__all__ = ["calibration_documents", "heldout_documents", "path"]

_FOLDER = Path(__file__).resolve().parent


def path() -> Path:
    """Folder of the packaged model, ready for ``from_pretrained``.

    Returns
    -------
    pathlib.Path
        Holds ``config.json``, ``model.safetensors``, the tokenizer and the model card.
    """
    return _FOLDER / "weights"


def calibration_documents() -> list[str]:
    """Whole Python files of packages the model was trained on.

    Returns
    -------
    list of str
        One string per file; for measuring activations and Hessians before pruning.
    """
    return _documents("calibration")


def heldout_documents() -> list[str]:
    """Whole Python files of packages the model never saw.

    Returns
    -------
    list of str
        One string per file; for measuring perplexity.
    """
    return _documents("heldout")


def _documents(name: str) -> list[str]:
    """Split a packaged text: each document follows a line of U+001E and the file's name."""
    data = (_FOLDER / "texts" / f"{name}.txt.gz").read_bytes()
    records = gzip.decompress(data).decode("utf-8").split("\x1e")[1:]
    return [record.split("\n", 1)[1] for record in records]
