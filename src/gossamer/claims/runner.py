"""Run claims, give verdicts, keep the ledger of records.

A record file holds one method's claims of one tier (and of one model, when it is not the
packaged one) under ``claims/`` of the results folder, written by ``gossamer claim`` and never
edited. A claim that fails stays in the ledger as failed.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gossamer import methods
from gossamer.claims.base import Claim, Tier, Verdict, mean
from gossamer.claims.lm import Place, nano, on
from gossamer.core import GossamerError, unknown
from gossamer.evaluate.environment import environment
from gossamer.models.store import write_json

__all__ = ["TIERS", "claims_of", "ledger", "results_folder", "run", "verdict_of"]

TIERS: tuple[Tier, ...] = ("smoke", "small", "gpu")
_WORST = (Verdict.FAILS, Verdict.WEAKER, Verdict.NOT_TESTABLE, Verdict.HOLDS)


def claims_of(key: str) -> tuple[Claim, ...]:
    """The claims of a method; empty when it has no claim module yet."""
    family = methods.get(key).card.family
    name = f"gossamer.claims.{family}.{key}"
    if find_spec(f"gossamer.claims.{family}") is None or find_spec(name) is None:
        return ()
    return tuple(import_module(name).CLAIMS)


def results_folder() -> Path | None:
    """Where the committed records lie: $GOSSAMER_RESULTS, the package, or its checkout."""
    here = Path(__file__).resolve()
    places = [os.environ.get("GOSSAMER_RESULTS"), here.parents[1] / "results"]
    places.append(here.parents[3] / "results")
    return next((Path(p) for p in places if p and Path(p, "claims").is_dir()), None)


def ledger(folder: Path | None = None) -> list[dict[str, Any]]:
    """All records, methods in their order, tiers from smoke to gpu."""
    folder = folder or results_folder()
    if folder is None:
        return []
    records: list[dict[str, Any]] = []
    for key in methods.keys():
        for tier in TIERS:
            for path in sorted((folder / "claims").glob(f"{key}.{tier}*.json")):
                records += json.loads(path.read_text(encoding="utf-8"))
    return records


def verdict_of(key: str, records: list[dict[str, Any]]) -> str | None:
    """The worst verdict among a method's records, or None without records."""
    found = {r["verdict"] for r in records if r["method"] == key}
    return next((str(v) for v in _WORST if v in found), None)


def run(
    key: str,
    tier: Tier = "smoke",
    out: Path | None = None,
    command: str | None = None,
    place: Place | None = None,
) -> Iterator[dict[str, Any]]:
    """Run a method's claims of one tier, yielding each record as it is made.

    Parameters
    ----------
    out : results folder to write to, or None to write nothing. The file appears when all claims
        of the method have run.
    place : another model than the packaged one; only portable claims run there.

    Raises
    ------
    GossamerError
        For an unknown method or tier.
    """
    if tier not in TIERS:
        raise unknown("tier", tier, TIERS)
    records = []
    for claim in claims_of(key):
        if claim.tier != tier or (place is not None and not claim.portable):
            continue
        with on(place) if place is not None else nullcontext():
            record = _record(key, claim, command or f"gossamer claim {key} --tier {tier}", place)
        records.append(record)
        yield record
    if out is not None and records:
        folder = out / "claims"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = tier if place is None else f"{tier}.{place.name}"
            write_json(folder / f"{key}.{name}.json", records)
        except OSError as error:
            raise GossamerError(f"cannot write to {folder}: {error.strerror}") from None


def _record(key: str, claim: Claim, command: str, place: Place | None) -> dict[str, Any]:
    start = time.perf_counter()
    figures = [dict(claim.run(seed)) for seed in claim.seeds]
    means = {name: mean(figures, name) for name in figures[0]}
    return {
        "method": key,
        "claim": claim.name,
        "tier": claim.tier,
        "verdict": str(claim.check(figures)),
        "sentence": claim.sentence,
        "paper": claim.paper,
        "experiment": claim.experiment.format(model=_described(place))
        if claim.portable
        else claim.experiment,
        "ours": claim.ours.format(**means),
        "figures": [{k: float(v) for k, v in f.items()} for f in figures],
        "seeds": list(claim.seeds),
        "seconds": round(time.perf_counter() - start, 2),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        **environment("cpu" if place is None else place.device),
    }


def _described(place: Place | None) -> str:
    """The model of a portable claim, in words."""
    if place is None:
        return "packaged model"
    with on(place):
        size = sum(p.numel() for p in nano().model.parameters())
    return f"{place.name} ({size / 1e6:.1f} M parameters), windows of {place.length} tokens"
