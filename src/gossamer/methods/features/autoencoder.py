"""Dictionary: the encoder and the atoms every sparse autoencoder shares.

Encoding is a matrix product and a selection rule, decoding a sum of few atoms. On disk it is
SAELens' layout, ``cfg.json`` and ``sae_weights.safetensors``, so other tools read it.
Shapes: R = rows, D = input width (d_in), M = latents (d_sae).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.core import GossamerError, SparseRows
from gossamer.methods.features.rules import Codes, Rule, combine, rule_from_config
from gossamer.models.store import atomic_folder, write_json

__all__ = ["Dictionary"]

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_PLAIN = {"normalize_activations": "none", "reshape_activations": "none"}


class Dictionary(nn.Module):
    """Atoms, the encoder that finds them, and the rule that keeps few.

    Parameters
    ----------
    d_in, d_sae : D and M.
    rule : which latents of a row stay.
    metadata : JSON-able facts about how it was made; travels with the files.

    Attributes
    ----------
    W_enc : (D, M). W_dec : (M, D), one atom per row, contiguous. b_enc : (M,). b_dec : (D,).
    """

    def __init__(
        self, d_in: int, d_sae: int, rule: Rule, metadata: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < (rule.budget or 1):
            raise GossamerError(
                f"a dictionary of {d_sae} latents over {d_in} channels cannot keep "
                f"k = {rule.budget}; raise the width or lower k"
            )
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.rule = rule
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def random(cls, d_in: int, d_sae: int, rule: Rule, *, seed: int, tied: bool = True) -> Self:
        """Atoms of random direction and norm 1.

        Parameters
        ----------
        tied : start the encoder as the transposed atoms, which keeps latents alive; otherwise
            as independent random directions.
        """
        made = cls(d_in, d_sae, rule)
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.randn(d_sae, d_in, generator=generator)
        other = atoms if tied else torch.randn(d_sae, d_in, generator=generator)
        with torch.no_grad():
            made.W_dec.copy_(nn.functional.normalize(atoms, dim=1))
            made.W_enc.copy_(nn.functional.normalize(other, dim=1).T)
        return made

    @property
    def d_in(self) -> int:
        """Input width D."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents M."""
        return self.W_dec.shape[0]

    # -- codes -----------------------------------------------------------------------------

    def pre_activations(self, rows: Tensor) -> Tensor:
        """(R, D) to (R, M): (x - b_dec) W_enc + b_enc."""
        return torch.addmm(self.b_enc, rows - self.b_dec, self.W_enc)

    def codes(self, rows: Tensor) -> Codes:
        """Codes of (R, D) rows in the form that training differentiates."""
        return self.rule(self.pre_activations(rows))

    def encode(self, x: Tensor) -> SparseRows:
        """Codes of activations.

        Parameters
        ----------
        x : (..., D), any float dtype; leading axes are flattened.

        Returns
        -------
        Padded ``SparseRows`` of shape (R, M); a rule with a budget of k stores at most k a row.

        Raises
        ------
        GossamerError
            If the width is not D or a value is NaN.
        """
        codes = self.codes(self._rows(x))
        return SparseRows(codes.values, codes.indices, (len(codes.values), self.d_sae))

    def decode(self, codes: SparseRows) -> Tensor:
        """Reconstruction (R, D) of codes, padded or CSR."""
        if codes.shape[1] != self.d_sae:
            raise GossamerError(
                f"codes name {codes.shape[1]} latents; this dictionary has {self.d_sae}"
            )
        padded = codes.to_padded()
        return combine(Codes(padded.values, padded.indices), self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of (..., D) in the shape and dtype of the input."""
        rows = combine(self.codes(self._rows(x)), self.W_dec) + self.b_dec
        return rows.view(x.shape).to(x.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise GossamerError(
                f"this dictionary reads {self.d_in} channels; the activations have {x.shape[-1]}"
            )
        return x.reshape(-1, self.d_in).to(self.W_enc.dtype)

    # -- scale -----------------------------------------------------------------------------

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Make a dictionary trained on ``scale * x`` read x itself.

        The biases are divided by the scale; atoms keep their norm, and codes come out in the
        units of x: z(x) = z_trained(scale * x) / scale. Reconstructions agree after scaling.
        """
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    # -- files -----------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The content of ``cfg.json``."""
        return {
            "architecture": self.rule.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": True,
            **_PLAIN,
            **self.rule.config(),
            "metadata": self.metadata,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights by their names in the file; those of the rule stand beside the dictionary's."""
        state = self.state_dict()
        return {name.removeprefix("rule."): value for name, value in state.items()}

    @classmethod
    def from_tensors(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The dictionary that :meth:`config` and :meth:`tensors` describe.

        Raises
        ------
        GossamerError
            On an unknown architecture, an option not supported, or tensors of other shapes.
        """
        for key, plain in _PLAIN.items():
            if config.get(key, plain) not in (plain, None):
                raise GossamerError(
                    f"{key} is {config[key]!r}; only {plain!r} is supported: fold it into the "
                    "weights first"
                )
        if not config.get("apply_b_dec_to_input", True):
            raise GossamerError("apply_b_dec_to_input is false; only true is supported")
        made = cls(config["d_in"], config["d_sae"], rule_from_config(dict(config)))
        made.metadata = dict(config.get("metadata") or {})
        names = {n.removeprefix("rule."): n for n in made.state_dict()}
        given = {names.get(name, name): tensor for name, tensor in tensors.items()}
        shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
        wrong = [n for n, shape in shapes.items() if n not in given or given[n].shape != shape]
        extra = sorted(set(given) - set(shapes))
        if wrong or extra:
            raise GossamerError(
                f"the weights do not fit a {config['architecture']} dictionary of "
                f"{made.d_in} x {made.d_sae}: {', '.join(wrong + extra)} missing, unknown or of "
                "another shape"
            )
        made.to(given["W_dec"].dtype).load_state_dict(given)
        if config.get("rescale_acts_by_decoder_norm"):
            made._fold_norms()
        return made

    @torch.no_grad()
    def _fold_norms(self) -> None:
        # A rule that ranks z_i ‖d_i‖ ranks plain codes once the norms sit in the encoder.
        norms = self.W_dec.norm(dim=1)
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])

    def save(self, folder: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors``; the folder appears whole or not.

        Raises
        ------
        GossamerError
            If the folder holds something or cannot be written.
        """
        with atomic_folder(folder) as part:
            own = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
            save_file(own, part / _WEIGHTS)
            write_json(part / _CONFIG, self.config())
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder written by :meth:`save` or by SAELens.

        Raises
        ------
        GossamerError
            If a file is missing or damaged, or holds what :meth:`from_tensors` refuses.
        """
        try:
            config = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(Path(folder) / _WEIGHTS)
            return cls.from_tensors(config, tensors)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
            raise GossamerError(
                f"{folder} holds no readable dictionary ({error}); "
                f"it needs {_CONFIG} and {_WEIGHTS}"
            ) from None
        except (KeyError, TypeError) as error:
            raise GossamerError(
                f"{Path(folder) / _CONFIG} lacks or misstates {error}; save the dictionary again"
            ) from None
