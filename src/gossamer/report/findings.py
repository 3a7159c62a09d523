"""Findings: what the rows say, in plain sentences computed from them."""

from gossamer.report.numbers import megabytes, percent, perplexity
from gossamer.report.rows import BLOCKS, TIE, USABLE, Group, Row, Table

__all__ = ["findings", "join"]


def join(words: list[str], most: int = 10) -> str:
    """``a, b and c``; beyond the most, the rest is counted: ``a, b and 7 more``."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def findings(table: Table) -> list[str]:
    """Sentences for the head of the page, the most important first."""
    if table.dense is None or len(table.rows) < 2:
        return ["There is nothing to compare yet: the results hold no dense row or no other one."]
    sentences = [_leader(table, group, rows) for group, rows in table.groups().items()]
    sentences = [text for text in sentences if text]
    return [*sentences, *_limits(table), *_baseline(table), *_speeds(table), *_bytes(table)]


def _what(group: Group) -> str:
    unit, sparsity, fixed = group
    if unit == BLOCKS:
        return f"about {percent(sparsity, 0)} of {unit} unread"
    return f"{fixed} {unit}" if fixed else f"{percent(sparsity)} of {unit} removed"


def _leader(table: Table, group: Group, rows: list[Row]) -> str:
    """Which method is best in one group; empty when only one method is in it."""
    rivals = [row for row in rows if not row.random]
    if len({row.method for row in rivals}) < 2 or rivals[0].perplexity is None:
        return ""
    first = rivals[0]
    assert first.perplexity is not None
    level = [
        r for r in rivals if r.perplexity is not None and r.perplexity < first.perplexity * TIE
    ]
    rest = [r for r in rivals if r not in level and r.perplexity is not None]
    names = join([table.name(row) for row in level])
    value = perplexity(first.perplexity)
    over = table.loss_over_dense(first)
    added = "" if over is None else f", {over:+.2f} nats on dense"
    head = f"With {_what(group)}" if not group[2] else f"At {_what(group)}"
    if len(level) == len(rivals):
        return f"{head}, {names} are level (perplexity {value}{added})."
    verb = "is best" if len(level) == 1 else "lead together"
    text = f"{head}, {names} {verb}: perplexity {value}{added}"
    if rest:
        text += f"; next is {table.name(rest[0])} at {perplexity(rest[0].perplexity)}"
    return text + "."


def _limits(table: Table) -> list[str]:
    """Up to which sparsity each method stays usable."""
    reach: dict[tuple[str, str], list[Row]] = {}
    for unit, lines in table.series().items():
        for line in lines:
            if line.role == "method" and not line.rows[0].fixed:
                reach[unit, line.label] = list(line.rows)
    held: dict[str, list[str]] = {}
    never: list[str] = []
    for (_, label), rows in reach.items():
        good = [row for row in rows if table.usable(row)]
        if good:
            top = max(good, key=lambda r: r.share)
            bad = [row for row in rows if not table.usable(row) and row.share > top.share]
            end = (
                f"to {percent(top.share, 0)} and break at {percent(bad[0].share, 0)}"
                if bad
                else (f"at all sparsities tried, up to {percent(top.share, 0)}")
            )
            end += f" of {BLOCKS} unread" if top.measure == BLOCKS else ""
            held.setdefault(end, []).append(label)
        else:
            never.append(label)
    parts = [
        f"{join(names)} {'hold' if len(names) > 1 else 'holds'} "
        f"{end if len(names) > 1 else end.replace(' and break ', ' and breaks ')}"
        for end, names in held.items()
    ]
    if never:
        parts.append(f"{join(never)} {'are' if len(never) > 1 else 'is'} beyond it throughout")
    if not parts:
        return []
    return [f"Within {USABLE:g}× the dense perplexity: {'; '.join(parts)}."]


def _baseline(table: Table) -> list[str]:
    """Methods that did no better than random at equal sparsity."""
    worse = []
    for rows in table.groups().values():
        chance = next((row for row in rows if row.random), None)
        if chance is None or chance.perplexity is None:
            continue
        worse += [
            f"{table.name(row)} ({percent(row.sparsity)})"
            for row in rows
            if not row.random and (row.perplexity is None or row.perplexity >= chance.perplexity)
        ]
    return [f"No better than random at the same sparsity: {join(worse)}."] if worse else []


def _speeds(table: Table) -> list[str]:
    timed = [r for r in table.rows if not r.dense and r.speedup is not None]
    simulated = sum(row.simulated for row in table.rows)
    text = []
    if timed:
        fast = max(timed, key=lambda r: r.speedup or 0.0)
        ratio = fast.speedup or 0.0
        if ratio > 1.0:
            text.append(
                f"Fastest is {table.name(fast)} at {percent(fast.sparsity)}: {ratio:.2f}× the "
                "dense model timed beside it."
            )
        else:
            text.append("No row decodes faster than dense on this machine.")
    if simulated:
        rows = "row runs" if simulated == 1 else "rows run"
        text.append(
            f"{simulated} {rows} the dense arithmetic with zeros in it (simulated): they show "
            "quality, and earn no speed number."
        )
    return text


def _bytes(table: Table) -> list[str]:
    base = table.dense.bytes_stored if table.dense else None
    stored = [r.bytes_stored for r in table.rows if not r.dense and r.bytes_stored is not None]
    if not base or not stored:
        return []
    if min(stored) >= base:
        return [
            f"No row is smaller on disk than dense ({megabytes(base)}): zeros are stored as "
            "zeros, and masks are added."
        ]
    return [f"The smallest row stores {megabytes(min(stored))}, dense {megabytes(base)}."]
