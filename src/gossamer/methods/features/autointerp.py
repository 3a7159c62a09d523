"""Auto-interp: a judge says when a latent fires, and is tested on what it said.

What it said is tested cheaply, by windows it has not seen (detection, fuzzing, embedding,
surprisal) or by pushing the latent (intervention). The cost is known before anything is asked.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core import Card, GossamerError, SparseRows, check_count, unknown
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.base import CountedMethod
from gossamer.methods.features.interp.cost import Cost, estimate
from gossamer.methods.features.interp.endpoints import EndpointJudge, LocalEmbedder, LocalJudge
from gossamer.methods.features.interp.firings import firings_of, pieces, speller
from gossamer.methods.features.interp.judges import Embedder, Judge, WordEmbedder, WordJudge
from gossamer.methods.features.interp.scores import (
    SCORERS,
    Score,
    detection,
    embedding,
    explain,
    fuzzing,
    surprisal,
)
from gossamer.methods.features.interp.windows import Sample, samples_of
from gossamer.methods.features.rules import Rule, TopK
from gossamer.methods.features.splicing import Splice
from gossamer.models import Applied, Progress, Report, SiteRow, State, as_tokens, find_sites

__all__ = ["AutoInterp", "Explained"]


@dataclass(frozen=True)
class Explained:
    """A latent in words.

    Parameters
    ----------
    latent : its number. explanation : what the judge said. scores : measure to 0..1.
    """

    latent: int
    explanation: str
    scores: dict[str, float]

    @property
    def score(self) -> float:
        """Mean over the measures."""
        return sum(self.scores.values()) / len(self.scores)

    def __str__(self) -> str:
        marks = ", ".join(f"{name} {value:.2f}" for name, value in self.scores.items())
        return f"latent {self.latent}: {self.explanation or '(nothing)'} ({marks})"


@dataclass(frozen=True, kw_only=True)
class AutoInterp(CountedMethod):
    """Fit a dictionary, put its latents into words, and keep those whose words hold.

    :meth:`cost` says what a judge will read, :meth:`interpret` explains and scores;
    :meth:`apply` then splices in the dictionary with only the latents that score at least
    ``least_score``, so that the model's loss says how much of it is in words.

    Parameters
    ----------
    k : latents kept of each token.
    judge : ``words``, a rule without a model; ``http://.../v1``, an OpenAI-compatible address
        (key in the environment variable ``GOSSAMER_JUDGE_KEY``); or a folder or hub id of a
        transformers model.
    judge_model : name that an address serves the model by.
    embedder : ``words``, or a folder or hub id of an encoder; for the embedding score.
    scorers : ``detection``, ``fuzzing``, ``embedding``, ``surprisal``. Intervention scoring
        needs prompts of its own: :func:`...interp.intervention.intervention`.
    latents : most latents to explain, drawn from those that fire often enough; None: all.
    shown, tested : windows to explain by, and to test by of each kind.
    length : tokens of a window. least : windows a latent must fire in.
    per_prompt : windows in one prompt; 1 leaks nothing between them and costs more.
    most_tokens : a language model is not asked if it would read and write more than so many.
    least_score : mean score from which a latent is kept.

    Examples
    --------
    >>> method = AutoInterp(k=16, latents=50, judge="http://127.0.0.1:8000/v1",
    ...                     judge_model="judge")
    >>> print(method.cost(model, text))           # doctest: +SKIP
    >>> for one in method.interpret(model, text):  # doctest: +SKIP
    ...     print(one)

    Source: arXiv 2410.13928, §3. Departs from the paper: windows are pieces of the text, not
    centred on the firing; latents need 20 windows, not 200, by default; silent windows are
    random ones; detection and fuzzing read a list of yes and no, not log-probabilities;
    splicing the explained part is ours.
    """

    card: ClassVar[Card] = Card(
        title="Automatically Interpreting Millions of Features in Large Language Models",
        year=2024,
        arxiv="2410.13928",
        system="autointerp",
        family="features",
        when="after training",
        start="dense",
        masks="static",
        site="codes of any module's output",
        score="how well words foretell a latent's firings",
        pattern="unstructured over latents",
        budget="score of an explanation",
        update="learned dictionary",
        kernel="sparse_code",
        departs="windows are pieces of the text; 20 windows a latent suffice; yes and no instead "
        "of log-probabilities",
    )
    example: ClassVar[Mapping[str, Any]] = {
        "k": 8,
        "tokens": 2048,
        "latents": 8,
        "length": 4,
        "least": 4,
        "shown": 4,
        "tested": 4,
    }
    exempt: ClassVar[Mapping[str, str]] = {
        **CountedMethod.exempt,
        "encoders": "a judge is shown tokens; a vision encoder has none",
    }

    judge: str = "words"
    judge_model: str = ""
    embedder: str = "words"
    scorers: tuple[str, ...] = ("detection", "fuzzing")
    latents: int | None = 100
    shown: int = 40
    tested: int = 50
    length: int = 32
    least: int = 20
    per_prompt: int = 5
    most_tokens: int = 10_000_000
    least_score: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorers:
            raise GossamerError(f"scorers is empty; give some of {', '.join(SCORERS)}")
        for name in self.scorers:
            if name not in SCORERS:
                raise unknown("scorer", name, SCORERS)
        for name in ("shown", "tested", "length", "per_prompt", "most_tokens"):
            check_count(name, getattr(self, name), 1)
        check_count("least", self.least, 2)
        if self.latents is not None:
            check_count("latents", self.latents, 1)
        if not 0 <= self.least_score <= 1:
            raise GossamerError(f"least_score is {self.least_score!r}; give a number of 0 to 1")

    def rule(self) -> Rule:
        return TopK(self.k)

    def judged_by(self) -> tuple[Judge, Embedder]:
        """The judge and the embedder that the fields name."""
        judge: Judge
        if self.judge == "words":
            judge = WordJudge()
        elif "://" in self.judge:
            judge = EndpointJudge(self.judge, self.judge_model)
        else:
            judge = LocalJudge(self.judge)
        return judge, WordEmbedder() if self.embedder == "words" else LocalEmbedder(self.embedder)

    def samples(self, model: nn.Module, data: Any, dictionary: Dictionary) -> list[Sample]:
        """Windows of the latents to explain, drawn by the seed.

        Raises
        ------
        GossamerError
            If no latent fires in enough windows.
        """
        tokens, hook = as_tokens(data, model, seed=self.seed), self.path_for(model, dictionary)
        found = pieces(firings_of(model, tokens, hook, dictionary), self.length)
        silent = int(found.real.any(1).sum())
        alive = [i for i in found.alive(self.least) if len(found.of(i)[0].unique()) < silent]
        if not alive:
            raise GossamerError(
                f"no latent fires in {self.least} of {len(found.ids)} windows and is silent in "
                "others; give more text or lower least"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(alive), generator=generator).tolist()[: self.latents]
        return list(
            samples_of(
                found,
                sorted(alive[i] for i in order),
                speller(model),
                shown=self.shown,
                tested=self.tested,
                length=self.length,
                seed=self.seed,
            )
        )

    def cost(self, model: nn.Module, data: Any, dictionary: Dictionary | None = None) -> Cost:
        """What a judge would read and write; it is not asked.

        Parameters
        ----------
        dictionary : of the hook's activations; None trains one, as :meth:`fit` does.
        """
        made = self.fit(model, data) if dictionary is None else dictionary
        return self._cost(self.samples(model, data, made))

    def _cost(self, samples: list[Sample]) -> Cost:
        return estimate(samples, self.scorers, per_prompt=self.per_prompt, seed=self.seed)

    def interpret(
        self,
        model: nn.Module,
        data: Any = None,
        dictionary: Dictionary | None = None,
        *,
        judge: Judge | None = None,
        embedder: Embedder | None = None,
        progress: Progress | None = None,
    ) -> tuple[Explained, ...]:
        """Latents in words with their scores; the model is as before.

        Parameters
        ----------
        judge, embedder : any object with their methods; None: those that the fields name.

        Raises
        ------
        GossamerError
            If a language model would read and write more than ``most_tokens``.
        """
        made = self.fit(model, data, progress=progress) if dictionary is None else dictionary
        samples = self.samples(model, data, made)
        cost = self._cost(samples)
        free = judge is None and self.judge == "words"
        if not free and cost.tokens > self.most_tokens:
            raise GossamerError(
                f"the judge would be asked {cost}; most_tokens is {self.most_tokens:,}: raise it, "
                f"or explain fewer latents than {len(samples)}"
            )
        if progress is not None and not free:
            progress(0, len(samples), f"judging: {cost}")
        named = self.judged_by() if judge is None or embedder is None else (judge, embedder)
        judge, embedder = judge or named[0], embedder or named[1]
        found = []
        for done, sample in enumerate(samples, start=1):
            (told,) = explain(judge, [sample])
            scores = [self._score(name, judge, embedder, told, sample) for name in self.scorers]
            found.append(Explained(sample.latent, told, {s.name: s.value for s in scores}))
            if progress is not None:
                progress(done, len(samples), f"latent {sample.latent}")
        return tuple(found)

    def _score(
        self, name: str, judge: Judge, embedder: Embedder, told: str, sample: Sample
    ) -> Score:
        if name == "embedding":
            return embedding(embedder, told, sample)
        if name == "surprisal":
            return surprisal(judge, told, sample)
        ask = detection if name == "detection" else fuzzing
        return ask(judge, told, sample, per_prompt=self.per_prompt, seed=self.seed)

    def apply(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        keep_error: bool = False,
        progress: Progress | None = None,
    ) -> "ExplainedModel":
        """Interpret, then splice in the dictionary with only the latents whose words hold."""
        method, made = self._fit(model, self.source(model, data), progress)
        found = method.interpret(model, data, made, progress=progress)
        return ExplainedModel(method, model, made, found, keep_error=keep_error)

    def reattach(
        self, model: nn.Module, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> "ExplainedModel":
        made = Dictionary.from_tensors(meta["config"], tensors).eval().requires_grad_(False)
        made.to(next(model.parameters()).device)
        found = tuple(Explained(**one) for one in meta["explained"])
        return ExplainedModel(self, model, made, found, keep_error=meta["keep_error"])


class ExplainedModel(Applied):
    """A model whose module speaks only through latents that are in words.

    Attributes
    ----------
    explained : the latents in words. dictionary : that was fitted. kept : latents that speak.
    """

    def __init__(
        self,
        method: AutoInterp,
        model: nn.Module,
        dictionary: Dictionary,
        explained: tuple[Explained, ...],
        *,
        keep_error: bool,
    ) -> None:
        super().__init__(method, model)
        assert method.hook is not None
        self.dictionary, self.explained, self.hook = dictionary, explained, method.hook
        self.keep_error = keep_error
        self.kept = tuple(one.latent for one in explained if one.score >= method.least_score)
        silent = torch.ones(dictionary.d_sae, dtype=torch.bool, device=dictionary.W_dec.device)
        silent[torch.tensor(self.kept, dtype=torch.long, device=silent.device)] = False

        def edit(codes: SparseRows) -> SparseRows:
            values = codes.values.masked_fill(silent[codes.indices.clamp_min(0)], 0)
            return SparseRows(values, codes.indices, codes.shape, codes.indptr)

        self._splice = Splice(model, self.hook, dictionary, keep_error=keep_error, edit=edit)
        self._join()

    def _undo(self) -> None:
        self._splice.remove()

    def state(self) -> State:
        meta = {
            "config": self.dictionary.config(),
            "explained": [asdict(one) for one in self.explained],
            "keep_error": self.keep_error,
        }
        return State(meta, self.dictionary.tensors())

    def report(self) -> Report:
        size, found = self.dictionary.d_sae, self.explained
        blocks = find_sites(self.model).blocks
        at = (i for i, b in enumerate(blocks) if f"{self.hook}.".startswith(f"{b}."))
        row = SiteRow(self.hook, "codes", next(at, -1), size, 1 - len(self.kept) / size)
        names = found[0].scores
        means = (f"{n} {sum(one.scores[n] for one in found) / len(found):.3f}" for n in names)
        best = sorted(found, key=lambda one: -one.score)[:3]
        notes = (
            f"{len(found)} latents in words, {len(self.kept)} of them kept; means: "
            + ", ".join(means),
            *(str(one) for one in best),
        )
        return Report(self.method.to_dict(), (row,), "latents", size, True, notes)
