"""recall: a small model that answers questions about contexts of up to 131072 tokens.

Sparse attention can only be judged on a model that finds what stands far back, and no small public
model does. This folder holds a language of needles, assignments and word lists, a tokenizer for
it, and the script that trains the model (``python -m gossamer.models.recall.train``: ten minutes
on one GPU). Trained weights are not packaged: name the folder that the script wrote.
"""

from pathlib import Path
from typing import Any

__all__ = ["load"]


def load(folder: str | Path, *, dtype: str | None = None, device: str = "cpu") -> Any:
    """The trained model and its tokenizer.

    Parameters
    ----------
    folder : what the training script wrote as ``--out``.
    dtype : ``float32``, ``bfloat16`` or ``float16``; None for float32 on CPU, bfloat16 elsewhere.

    Raises
    ------
    GossamerError
        If there is no such folder, or it holds another model.
    """
    from gossamer.core import GossamerError
    from gossamer.models.loading import load_model
    from gossamer.models.recall.tokenizer import vocabulary

    if not Path(folder).is_dir():
        raise GossamerError(
            f"no folder {folder}; train recall with "
            f"python -m gossamer.models.recall.train --out {folder} --time-limit 560"
        )
    loaded = load_model(folder, dtype=dtype, device=device)
    size = loaded.model.config.vocab_size
    if size != len(vocabulary()):
        raise GossamerError(
            f"{folder} has {size} tokens where the recall language has {len(vocabulary())}; "
            "train it anew"
        )
    return loaded
