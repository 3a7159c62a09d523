"""Dictionary: the encoder and the atoms every sparse autoencoder shares.

Encoding is a matrix product and a selection rule, decoding a sum of few atoms. On disk it is
SAELens' layout, ``cfg.json`` and ``sae_weights.safetensors``, so other tools read it.
Shapes: R = rows, D = input width (d_in), D_out = width of what is reconstructed (d_out; D unless
said otherwise), M = latents (d_sae).
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
from gossamer.kernels.sparse_code import encode_at
from gossamer.methods.features.rules import Batch, Codes, Rule, combine, rule_from_config
from gossamer.models.store import atomic_folder, write_json

__all__ = ["Dictionary"]

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_PLAIN = {"normalize_activations": "none", "reshape_activations": "none"}


def _training_only(name: str) -> bool:
    """Whether a tensor of the rule is what training keeps for itself."""
    return name.rpartition(".")[2].startswith("running_")


class Dictionary(nn.Module):
    """Atoms, the encoder that finds them, and the rule that keeps few.

    Parameters
    ----------
    d_in, d_sae : D and M.
    rule : which latents of a row stay.
    d_out : D_out, for a transcoder, which answers rows with other rows; ``b_dec`` is then not
        subtracted from what it reads. None: an autoencoder.
    skip : with ``d_out``, add a linear map of the rows to the answer.
    metadata : JSON-able facts about how it was made; travels with the files.

    Attributes
    ----------
    W_enc : (D, M), a latent's weights contiguous. W_dec : (M, D_out), one atom per row,
    contiguous. b_enc : (M,); fixed at zero where the rule has no use for it. b_dec : (D_out,).
    W_skip : (D, D_out) or None.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        rule: Rule,
        metadata: Mapping[str, Any] | None = None,
        *,
        d_out: int | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__()
        if d_in < 1 or d_sae < (rule.budget or 1):
            raise GossamerError(
                f"a dictionary of {d_sae} latents over {d_in} channels cannot keep "
                f"k = {rule.budget}; raise the width or lower k"
            )
        self.transcoder = d_out is not None
        wide = d_in if d_out is None else d_out
        # In memory a latent's weights lie together: its gradient comes as one piece.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae), requires_grad=rule.encoder_bias)
        self.W_dec = nn.Parameter(torch.zeros(d_sae, wide))
        self.b_dec = nn.Parameter(torch.zeros(wide))
        self.W_skip = nn.Parameter(torch.zeros(d_in, wide)) if self.transcoder and skip else None
        self.rule = rule
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def random(
        cls,
        d_in: int,
        d_sae: int,
        rule: Rule,
        *,
        seed: int,
        tied: bool = True,
        d_out: int | None = None,
        skip: bool = False,
    ) -> Self:
        """Atoms of random direction and norm 1.

        Parameters
        ----------
        tied : start the encoder as the transposed atoms, which keeps latents alive; otherwise
            as independent random directions. The atoms of a transcoder live elsewhere: its
            encoder is always independent of them.
        """
        made = cls(d_in, d_sae, rule, d_out=d_out, skip=skip)
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.randn(d_sae, made.d_out, generator=generator)
        tied = tied and not made.transcoder
        other = atoms if tied else torch.randn(d_sae, d_in, generator=generator)
        with torch.no_grad():
            made.W_dec.copy_(nn.functional.normalize(atoms, dim=1))
            made.W_enc.copy_(nn.functional.normalize(other, dim=1).T)
        return made

    @property
    def d_in(self) -> int:
        """Input width D."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width D_out of the reconstruction."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents M."""
        return self.W_dec.shape[0]

    # -- codes -----------------------------------------------------------------------------

    def pre_activations(self, rows: Tensor) -> Tensor:
        """(R, D) to (R, M): (x - b_dec) W_enc + b_enc; a transcoder subtracts nothing."""
        read = self._centred(rows)
        return torch.addmm(self.b_enc.to(read.dtype), read, self.W_enc)

    def _centred(self, rows: Tensor) -> Tensor:
        read = rows if self.transcoder else rows - self.b_dec
        # Biases stay float32 where the matrices compute in half precision.
        return read.to(self.W_enc.dtype)

    def encoded(self, rows: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, Batch]:
        """Pre-activations (R, M) and what a rule may look at beside them.

        Parameters
        ----------
        gradient : (R, D_out), of the model's loss by the rows, for rules that rank by it.
        """
        if not self.rule.gathers:
            return self.pre_activations(rows), Batch(rows, self.W_dec, self.b_dec, gradient)
        with torch.no_grad():
            read = self._centred(rows)
            pre = torch.addmm(self.b_enc.to(read.dtype), read, self.W_enc)
        offset = None if self.transcoder else self.b_dec

        def at(indices: Tensor) -> Tensor:
            return encode_at(read, self.W_enc, self.b_enc, pre, indices, offset)

        return pre, Batch(rows, self.W_dec, self.b_dec, gradient, at)

    def codes(self, rows: Tensor, gradient: Tensor | None = None) -> Codes:
        """Codes of (R, D) rows in the form that training differentiates."""
        return self.rule(*self.encoded(rows, gradient))

    def reconstruct(self, codes: Codes, rows: Tensor) -> Tensor:
        """(R, D_out): sum of the named atoms, b_dec, and the skip of the rows if there is one."""
        plain = combine(codes, self.W_dec) + self.b_dec
        return plain if self.W_skip is None else plain + rows.to(self.W_skip.dtype) @ self.W_skip

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

    def decode(self, codes: SparseRows, x: Tensor | None = None) -> Tensor:
        """Reconstruction (R, D_out) of codes, padded or CSR.

        Parameters
        ----------
        x : the rows that the codes stand for; a transcoder with a skip needs them.
        """
        if codes.shape[1] != self.d_sae:
            raise GossamerError(
                f"codes name {codes.shape[1]} latents; this dictionary has {self.d_sae}"
            )
        if self.W_skip is not None and x is None:
            raise GossamerError("this dictionary adds a skip of its input; give decode the rows x")
        padded = codes.to_padded()
        rows = self.b_dec.new_empty(0) if x is None else self._rows(x)
        return self.reconstruct(Codes(padded.values, padded.indices), rows)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of (..., D) as (..., D_out), in the dtype of the input."""
        rows = self._rows(x)
        made = self.reconstruct(self.codes(rows), rows)
        return made.view(*x.shape[:-1], self.d_out).to(x.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise GossamerError(
                f"this dictionary reads {self.d_in} channels; the activations have {x.shape[-1]}"
            )
        rows = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        if bool(rows.sum().isnan()) and (bad := int(rows.isnan().any(1).sum())):
            raise GossamerError(
                f"{bad} of {len(rows)} rows of activations hold NaN; load the model in float32"
            )
        return rows

    # -- scale -----------------------------------------------------------------------------

    @torch.no_grad()
    def fold_input_scale(self, scale: float, output_scale: float | None = None) -> None:
        """Make a dictionary trained on ``scale * x`` read x itself.

        The biases and the rule's thresholds are divided by the scale; atoms keep their norm, and
        codes come out in the units of x: z(x) = z_trained(scale * x) / scale. Reconstructions
        agree after scaling.

        Parameters
        ----------
        output_scale : of what a transcoder reconstructs, if it is another one: the atoms, which
            answer in those units, are scaled.
        """
        other = scale if output_scale is None else output_scale
        self.b_enc.div_(scale)
        self.b_dec.div_(other)
        self.rule.fold_input_scale(scale)
        if other != scale:
            self.W_dec.mul_(scale / other)
            if self.W_skip is not None:
                self.W_skip.mul_(scale / other)

    # -- files -----------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The content of ``cfg.json``; a rule in which a batch competed is stored as thresholds."""
        rule = self.rule.inference(self.d_sae)
        return {
            "architecture": rule.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": not self.transcoder,
            **({"d_out": self.d_out, "skip": self.W_skip is not None} if self.transcoder else {}),
            **_PLAIN,
            **rule.config(),
            "metadata": self.metadata,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights by their names in the file; those of the rule stand beside the dictionary's."""
        own = {n: value for n, value in self.state_dict().items() if not n.startswith("rule.")}
        if not self.rule.encoder_bias:
            del own["b_enc"]
        kept = self.rule.inference(self.d_sae).state_dict()
        return own | {n: value for n, value in kept.items() if not _training_only(n)}

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
        wide = config.get("d_out")
        if wide is None and not config.get("apply_b_dec_to_input", True):
            raise GossamerError("apply_b_dec_to_input is false; only true is supported")
        rule, skip = rule_from_config(dict(config)), bool(config.get("skip"))
        made = cls(config["d_in"], config["d_sae"], rule, d_out=wide, skip=skip)
        made.metadata = dict(config.get("metadata") or {})
        state = made.state_dict()
        names = {n.removeprefix("rule."): n for n in state if not _training_only(n)}
        given = {names.get(name, name): tensor for name, tensor in tensors.items()}
        if not rule.encoder_bias:
            given.setdefault("b_enc", torch.zeros(made.d_sae))
        shapes = {name: state[name].shape for name in names.values()}
        wrong = [n for n, shape in shapes.items() if n not in given or given[n].shape != shape]
        extra = sorted(set(given) - set(shapes))
        if wrong or extra:
            raise GossamerError(
                f"the weights do not fit a {config['architecture']} dictionary of "
                f"{made.d_in} x {made.d_sae}: {', '.join(wrong + extra)} missing, unknown or of "
                "another shape"
            )
        made.to(given["W_dec"].dtype).load_state_dict(given, strict=False)
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
            if not isinstance(config, dict):
                raise TypeError(f"a configuration: it holds a {type(config).__name__}")
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
