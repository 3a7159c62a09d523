"""SAE embeddings: planted properties are named, related, grouped by and found."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, average_precision_score
from torch import Tensor

from gossamer.claims.base import Claim, Figures, Verdict, mean
from gossamer.claims.features.beds import one_thread
from gossamer.methods.features.autoencoder import Dictionary
from gossamer.methods.features.embeddings import (
    Embeddings,
    associations,
    clusters,
    differences,
    embed,
    retrieve,
    token_labels,
    weights_from_examples,
    weights_from_words,
)
from gossamer.methods.features.sae_embeddings import SAEEmbeddings
from gossamer.methods.features.source import ActivationSource
from gossamer.models import Tokens, templates
from gossamer.models.templates import tasks

__all__ = ["CLAIMS"]

_HOOK = "model.embed_tokens"
_DOCUMENTS, _WIDTH = 400, 256


class _Corpus(NamedTuple):
    """Documents, and what is true of each."""

    tokens: Tokens
    topic: Tensor
    feeling: Tensor
    kite: Tensor


def _corpus(count: int, seed: int, rate: float) -> _Corpus:
    """A sentence of names, one of feeling and a line of a topic each, in one window.

    Some documents, a share ``rate``, speak of a kite in the office; in no other are both.
    """
    names, felt, told = (
        # A seed of its own for each, or their attributes would be the same draws.
        templates.batch(task, count, 3 * seed + i)
        for i, task in enumerate(("names", "feelings", "topics"))
    )
    known = templates.vocabulary()
    generator = torch.Generator().manual_seed(seed + 7)
    planted = torch.rand(count, generator=generator) < rate
    ids = names.ids.clone()
    things = [known[word] for word in tasks.OBJECTS]
    places = [known[word] for word in tasks.PLACES]
    is_thing = torch.isin(ids, torch.tensor(things))
    is_place = torch.isin(ids, torch.tensor(places))
    plain_thing = torch.tensor(things)[torch.randint(5, (count,), generator=generator)]
    plain_place = torch.tensor(places)[torch.randint(5, (count,), generator=generator)]
    thing = torch.where(planted, known["kite"], plain_thing)
    place = torch.where(planted, known["office"], plain_place)
    ids = torch.where(is_thing, thing[:, None], ids)
    ids = torch.where(is_place, place[:, None], ids)
    sentence = felt.ids.clone()
    other = torch.isin(sentence, torch.tensor(places))
    sentence = torch.where(other, known["park"], sentence)
    every = torch.cat([ids, sentence, told.ids], 1)
    return _Corpus(
        Tokens.from_ids(every),
        told.attributes["topic"],
        felt.attributes["feeling"],
        (every == known["kite"]).any(1),
    )


@cache
def _dictionary(seed: int) -> tuple[torch.nn.Module, Dictionary]:
    model = templates.load()
    method = SAEEmbeddings(
        hook=_HOOK, width=_WIDTH, k=4, tokens=50_000, batch_size=256, lr=5e-3, seed=seed
    )
    return model, method.fit(model, _corpus(300, 1000 + seed, 0.2).tokens)


@torch.no_grad()
def _dense(model: torch.nn.Module, corpus: _Corpus) -> Tensor:
    """The mean hidden state of a document, as dense embeddings are made."""
    rows = torch.cat(list(ActivationSource(model, _HOOK, corpus.tokens, windows=200).one_pass()))
    return rows.view(len(corpus.tokens), -1, rows.shape[1]).mean(1)


def _embedded(seed: int, corpus: _Corpus) -> Embeddings:
    model, made = _dictionary(seed)
    known = templates.vocabulary()
    return embed(model, made, _HOOK, corpus.tokens, exclude=(known["<s>"],), batch_size=200)


def _bags(labels: dict[int, str]) -> Tensor:
    """Labels as vectors (latents, words): two latents for one word are alike."""
    known = templates.vocabulary()
    made = torch.zeros(_WIDTH, len(known))
    for latent, label in labels.items():
        for word in label.split():
            made[latent, known[word]] = 1
    return made


def _f1(said: Tensor, true: Tensor) -> float:
    both = float((said & true).sum())
    return 2 * both / max(1.0, float(said.sum() + true.sum()))


def _best_f1(embedded: Embeddings, latents: Sequence[int], true: Tensor) -> float:
    present = torch.from_numpy(embedded.present().toarray() > 0)
    return max(_f1(present[:, i], true) for i in latents)


def _difference(seed: int) -> Figures:
    with one_thread():
        often, seldom = _corpus(_DOCUMENTS, seed, 0.2), _corpus(_DOCUMENTS, seed + 50, 0.05)
        new = _corpus(_DOCUMENTS, seed + 90, 0.2)
        one, two, unseen = (_embedded(seed, part) for part in (often, seldom, new))
        ranked = differences(one, two)
        top = [found.latent for found in ranked[:3]]
        model, _ = _dictionary(seed)
        first, second, third = (_dense(model, part) for part in (often, seldom, new))
        gap = first.mean(0) - second.mean(0)
        axes = gap.abs().topk(3).indices.tolist()
        limits = torch.cat([first, second]).mean(0)
        dense = max(_f1((third[:, a] > limits[a]) == bool(gap[a] > 0), new.kite) for a in axes)
        same = differences(one.rows(range(0, _DOCUMENTS, 2)), one.rows(range(1, _DOCUMENTS, 2)))
        labels = token_labels(
            *_dictionary(seed), _HOOK, often.tokens, templates.words(), batch_size=200
        )
        pairs = associations(one, least=10, most=0.5, vectors=_bags(labels), alike=0.5)
        best = pairs[0]
        both = [_best_f1(unseen, [i], new.kite) for i in (best.first, best.second)]
        return {
            "f1": _best_f1(unseen, top, new.kite),
            "f1_dense": dense,
            "f1_random": mean([{"x": _best_f1(unseen, [i], new.kite)} for i in range(_WIDTH)], "x"),
            "fdr": ranked[0].fdr,
            "false": float(sum(found.fdr <= 0.05 for found in same)),
            "npmi": best.npmi,
            "pair": min(both),
            "pair_fdr": best.fdr,
        }


def _check_difference(runs: Sequence[Figures]) -> Verdict:
    named = mean(runs, "f1") > mean(runs, "f1_dense") + 0.2
    if not named or mean(runs, "f1") < 0.6 or mean(runs, "false") > 3:
        return Verdict.FAILS
    exact = all(run["f1"] >= 0.9 and run["fdr"] < 0.05 and run["pair"] >= 0.9 for run in runs)
    return Verdict.HOLDS if exact else Verdict.WEAKER


def _groups(seed: int) -> Figures:
    with one_thread():
        corpus = _corpus(_DOCUMENTS, seed + 200, 0.2)
        model, made = _dictionary(seed)
        labels = token_labels(model, made, _HOOK, corpus.tokens, templates.words())
        found = _embedded(seed, corpus).labelled(labels)
        words = " ".join(word for group in tasks.FEELINGS.values() for word in group[0])
        axis = weights_from_words(found, words)
        chosen = [i for i, weight in axis.items() if weight >= 0.5]
        groups = clusters(found, 4, latents=chosen, seed=seed).groups
        unfiltered = clusters(found, 4, seed=seed).groups
        dense = _dense(model, corpus)
        plain = KMeans(4, n_init="auto", random_state=seed).fit(dense.numpy()).labels_
        truth = corpus.kite
        examples = torch.arange(_DOCUMENTS) < 60
        rest = torch.arange(60, _DOCUMENTS)
        asked = weights_from_examples(found.rows(examples), truth[examples])
        hits = retrieve(found.rows(rest), asked, draws=20, seed=seed) if asked else []
        score = torch.zeros(len(rest))
        for hit in hits:
            score[hit.document] = hit.score
        near = dense[examples][truth[examples]].mean(0) - dense[examples].mean(0)
        wanted = truth[rest].numpy()
        return {
            "ari": float(adjusted_rand_score(corpus.feeling, groups)),
            "ari_all": float(adjusted_rand_score(corpus.feeling, unfiltered)),
            "ari_dense": float(adjusted_rand_score(corpus.feeling, plain)),
            "latents": float(len(chosen)),
            "ap": float(average_precision_score(wanted, score.numpy())),
            "ap_dense": float(average_precision_score(wanted, (dense[rest] @ near).numpy())),
            "ap_random": float(wanted.mean()),
        }


def _check_groups(runs: Sequence[Figures]) -> Verdict:
    ari, dense = mean(runs, "ari"), mean(runs, "ari_dense")
    if ari <= dense or ari <= mean(runs, "ari_all") or mean(runs, "ap") <= mean(runs, "ap_random"):
        return Verdict.FAILS
    found = mean(runs, "ap") >= mean(runs, "ap_dense")
    return Verdict.HOLDS if ari >= 0.8 and dense <= 0.4 and found else Verdict.WEAKER


CLAIMS = (
    Claim(
        name="names what differs",
        sentence="Comparing how often latents speak in two corpora names a planted property, and "
        "their co-occurrence a planted link, which dense embeddings cannot.",
        paper="larger differences found than by a language model reading the data, at 2 to 8 times "
        "less cost (abstract)",
        experiment="400 and 400 documents of templated sentences of which 20 % and 5 % speak of a "
        "kite in the office; TopK dictionary of the packaged model's token embeddings; holds when "
        "one of the 3 latents that differ most (FDR below 5 %) tells unseen documents apart with "
        "F1 0.9, both latents of the pair with the highest NPMI do, and a split at random finds "
        "no more than 3",
        run=_difference,
        check=_check_difference,
        ours="F1 {f1:.2f} of the best of 3 latents, of 3 dense channels {f1_dense:.2f}, of a "
        "random latent {f1_random:.2f}; F1 of the linked pair {pair:.2f} at NPMI {npmi:.2f}; "
        "{false:.1f} findings between halves of one corpus",
    ),
    Claim(
        name="groups by a chosen axis",
        sentence="Clusters of latents that a query chose follow the axis asked for, whatever else "
        "documents are about; properties are found by their latents.",
        paper="groups along chosen axes; better than dense embeddings at finding properties (no "
        "figure here, quoted from memory)",
        experiment="400 documents with one of four feelings, one of four topics and other matter; "
        "latents chosen by words of feeling in their labels; holds when the adjusted Rand index "
        "with feelings is at least 0.8, that of k-means on dense vectors of the same model at most "
        "0.4, and 60 marked examples find the others with an average precision no lower than by "
        "the dense difference of means",
        run=_groups,
        check=_check_groups,
        ours="Rand index {ari:.2f} with {latents:.0f} latents chosen, all latents {ari_all:.2f}, "
        "dense {ari_dense:.2f}; average precision {ap:.2f}, dense {ap_dense:.2f}, random "
        "{ap_random:.2f}",
    ),
)
