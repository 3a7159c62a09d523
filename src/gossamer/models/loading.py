"""Loading: a model and its tokenizer from a folder, the Hugging Face hub, or this package.

Everything that can be wrong with a folder is looked for before transformers reads it, so that a
user sees one line that says what is missing. Nothing is unpickled unless asked for, no code from
a checkpoint is ever run.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gossamer.core import GossamerError, unknown
from gossamer.models.quiet import quiet

__all__ = [
    "EXPORT_MANIFEST",
    "Loaded",
    "as_device",
    "as_dtype",
    "check_safetensors",
    "find_tokenizer",
    "first_line",
    "load_model",
    "load_tokenizer",
    "read_json",
    "resolve",
    "shard_files",
]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
EXPORT_MANIFEST = "gossamer-export.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "gossamer.*",
)
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Loaded(NamedTuple):
    """A model in eval mode and its tokenizer (None for a model that has none)."""

    model: Any
    tokenizer: Any


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    kind: Literal["causal", "any"] = "causal",
) -> Loaded:
    """Load a model for measuring and pruning.

    Parameters
    ----------
    source : ``"nano"`` (the packaged model), a folder, or a hub id.
    dtype : None for float32 on CPU and bfloat16 elsewhere.
    allow_pickle : read ``.bin`` weights where there are no safetensors, as tensors only.
    kind : ``"any"`` also takes models without a language-model head, such as encoders.

    Raises
    ------
    GossamerError
        If the source is missing, incomplete, damaged, of the wrong kind, or pickled.
    """
    place = as_device(device)
    number = as_dtype(dtype, place)
    folder = resolve(source, allow_pickle=allow_pickle)
    config = _check_config(folder)
    pickled = _check_weights(folder, allow_pickle)
    architecture = _architecture(folder, config, kind)
    with quiet():
        tokenizer = load_tokenizer(folder, required=kind == "causal")
        model = _load(folder, architecture, number, pickled)
        try:
            model = model.to(place).eval()
        except RuntimeError as error:
            raise GossamerError(f"{source} does not fit on {place}: {first_line(error)}") from None
    return Loaded(model, tokenizer)


def resolve(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The folder a source stands for, fetched from the hub if it is a hub id.

    Raises
    ------
    GossamerError
        If there is no such folder or hub id, or the hub cannot be reached.
    """
    text = str(source)
    if not text.strip():
        raise GossamerError("the model has no name; give 'nano', a folder or a hub id")
    if text == "nano":
        from gossamer.models import nano

        return nano.path()
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise GossamerError(f"{text} is a file; give the folder that holds config.json")
    if isinstance(source, Path) or text.startswith("~") or not _HUB_ID.fullmatch(text):
        raise GossamerError(f"no folder {text}; give 'nano', a model folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, *(_PICKLES if allow_pickle else ())]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        raise GossamerError(
            f"{text} is neither a folder nor a model that could be fetched from the hub "
            f"({first_line(error)}); give 'nano', a folder, or a hub id while online"
        ) from None


def find_tokenizer(model: Any) -> Any:
    """The tokenizer beside a model, found by the name the model was loaded from.

    Raises
    ------
    GossamerError
        If the model has no such name, or no tokenizer lies there.
    """
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        raise GossamerError(
            "the model was not loaded from anywhere, so its tokenizer is unknown; "
            "give token ids instead of text"
        )
    with quiet():
        if Path(name).is_dir():
            return load_tokenizer(Path(name), required=True)
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            raise GossamerError(
                f"no tokenizer for {name} ({first_line(error)}); give token ids instead of text"
            ) from None


def as_device(device: str | torch.device) -> torch.device:
    """The device of that name; GossamerError if it cannot be used."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:
        raise GossamerError(f"device {device!s} cannot be used: {first_line(error)}") from None
    return place


def as_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None for float32 on CPU and bfloat16 elsewhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        if dtype in _DTYPES.values():
            return dtype
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, tuple(_DTYPES))
    return _DTYPES[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; GossamerError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GossamerError(
            f"{path} cannot be read ({first_line(error)}); copy the model again"
        ) from None
    if not isinstance(value, dict):
        raise GossamerError(f"{path} holds no JSON object; copy the model again")
    return value


def _check_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if not any(folder.iterdir()):
            raise GossamerError(f"{folder} is empty; give a model folder")
        if (folder / "adapter_config.json").is_file():
            raise GossamerError(f"{folder} holds an adapter only; merge it into its model first")
        raise GossamerError(f"{folder} has no config.json, so it is not a (whole) model folder")
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise GossamerError(f"{path} names no model_type; copy the model again")
    if kind not in transformers.CONFIG_MAPPING:
        raise GossamerError(
            f"transformers {transformers.__version__} does not know models of type {kind!r} "
            f"({path}); code from a checkpoint is never run"
        )
    if config.get("quantization_config"):
        raise GossamerError(
            f"{folder} holds quantised weights, which cannot be pruned or measured; "
            "use the model they were made from"
        )
    return config


def _check_weights(folder: Path, allow_pickle: bool) -> bool:
    """Whether the weights are pickled; an error unless they are all there."""
    if (folder / "model.safetensors").is_file():
        check_safetensors(folder / "model.safetensors")
        return False
    if (folder / "model.safetensors.index.json").is_file():
        for shard in shard_files(folder / "model.safetensors.index.json"):
            check_safetensors(shard)
        return False
    if (folder / EXPORT_MANIFEST).is_file():
        raise GossamerError(f"{folder} is an export without its zeros; open it with gossamer.load")
    pickles = sorted(p.name for p in folder.glob("*.bin") if p.name.startswith("pytorch_model"))
    if not pickles:
        raise GossamerError(f"{folder} has no weights (no model.safetensors); copy the model again")
    if not allow_pickle:
        raise GossamerError(
            f"{folder} holds pickled weights only ({pickles[0]}), which may run code when read; "
            "convert them to safetensors, or allow it with --allow-pickle (allow_pickle=True)"
        )
    if (folder / "pytorch_model.bin.index.json").is_file():
        shard_files(folder / "pytorch_model.bin.index.json")
    return True


def shard_files(index: Path) -> list[Path]:
    """The files an index names, all of them there."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise GossamerError(f"{index} names no weights; copy the model again")
    names = sorted({str(name) for name in weights.values()})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GossamerError(
            f"{index.parent} lacks {missing[0]}{more} of {len(names)} weight files; "
            "copy the model again"
        )
    return [index.parent / name for name in names]


def check_safetensors(path: Path) -> None:
    """Raise GossamerError if a safetensors file is damaged, cut short or empty."""
    try:
        # Opening reads the header and compares it with the file's size, not the weights.
        with safe_open(path, framework="pt") as file:
            empty = not list(file.keys())
    except (SafetensorError, OSError) as error:
        raise GossamerError(
            f"{path} is damaged or cut short ({first_line(error)}); copy the model again"
        ) from None
    if empty:
        raise GossamerError(f"{path} holds no weights; copy the model again")


def _architecture(folder: Path, config: dict[str, Any], kind: str) -> str | None:
    """The class the folder was saved from; None when it names none."""
    if kind not in ("causal", "any"):
        raise unknown("kind", kind, ("causal", "any"))
    named = config.get("architectures") or []
    name = named[0] if isinstance(named, list) and named else None
    if kind == "any":
        return name if isinstance(name, str) else None
    causal = {
        each
        for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for each in ((entry,) if isinstance(entry, str) else entry)
    }
    known = config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if (name is not None and name not in causal) or not known:
        raise GossamerError(
            f"{folder} holds {name or config['model_type']}, which is not a causal language model"
        )
    return name


def load_tokenizer(folder: Path, *, required: bool) -> Any:
    """The tokenizer in a folder; None where there is none and none is required."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        if required:
            raise GossamerError(f"{folder} has no tokenizer (no tokenizer.json); copy it there")
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise GossamerError(
            f"the tokenizer in {folder} cannot be read: {first_line(error)}"
        ) from None


def _load(folder: Path, architecture: str | None, dtype: torch.dtype, pickled: bool) -> Any:
    loader: Any = getattr(transformers, architecture or "", None)
    if loader is None:
        loader = AutoModel if architecture is None else AutoModelForCausalLM
    options = {} if hasattr(loader, "config_class") else {"trust_remote_code": False}
    try:
        model, facts = loader.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=not pickled,
            weights_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise GossamerError(f"{folder} cannot be loaded: {first_line(error)}") from None
    # transformers fills what it does not find with random numbers and only mentions it.
    missing = sorted(facts.get("missing_keys", ()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GossamerError(f"{folder} lacks the weights {missing[0]}{more}; copy the model again")
    return model


def first_line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:")[:200] if lines else type(error).__name__
