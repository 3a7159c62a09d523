"""Prompts: what a judge reads, and how its answer is read.

Every prompt says its task on the first line and holds one text a line, so that a rule can read it
as well as a language model can.
"""

import re
from collections.abc import Sequence

__all__ = ["DETECT", "EXPLAIN", "FUZZ", "explain_prompt", "read_answer", "read_task", "test_prompt"]

EXPLAIN, DETECT, FUZZ = "explain", "detect", "fuzz"
_INSTRUCTIONS = {
    EXPLAIN: "A feature of a language model fires at the tokens marked <<so>>. In one short line, "
    "say what they have in common. Answer with that line alone.",
    DETECT: "A feature of a language model is described below. For each text say whether the "
    "feature fires anywhere in it. Answer with a list of 1 (yes) and 0 (no), one a text, such as "
    "[1, 0].",
    FUZZ: "A feature of a language model is described below. In each text tokens are marked "
    "<<so>>. For each text say whether the marked tokens are where the feature fires. Answer with "
    "a list of 1 (yes) and 0 (no), one a text, such as [1, 0].",
}
_LIST = re.compile(r"\[([01,\s]*)\]")


def _lines(texts: Sequence[str]) -> str:
    # A line a text: line breaks inside would look like further texts.
    flat = (" ".join(text.split("\n")) for text in texts)
    return "\n".join(f"Text {i}: {text}" for i, text in enumerate(flat, start=1))


def explain_prompt(texts: Sequence[str]) -> str:
    """Asks what marked tokens have in common."""
    return f"Task: {EXPLAIN}\n{_INSTRUCTIONS[EXPLAIN]}\n{_lines(texts)}\nExplanation:"


def test_prompt(kind: str, explanation: str, texts: Sequence[str]) -> str:
    """Asks which of some texts an explanation fits."""
    told = " ".join(explanation.split())
    return f"Task: {kind}\n{_INSTRUCTIONS[kind]}\nExplanation: {told}\n{_lines(texts)}\nAnswer:"


def read_task(prompt: str) -> tuple[str, str, list[str]]:
    """Task, explanation (empty where it is asked for) and texts of a prompt."""
    lines = prompt.split("\n")
    kind = lines[0].removeprefix("Task: ")
    told = next((line for line in lines[:-1] if line.startswith("Explanation: ")), "")
    texts = [line.partition(": ")[2] for line in lines if re.match(r"Text \d+: ", line)]
    return kind, told.removeprefix("Explanation: "), texts


def read_answer(answer: str, count: int) -> list[bool] | None:
    """The last list of 0 and 1 in an answer, or None if it has another length."""
    found = _LIST.findall(answer)
    marks = re.findall(r"[01]", found[-1]) if found else []
    return [mark == "1" for mark in marks] if len(marks) == count else None


# Its name begins like a test's; pytest is not to collect it.
test_prompt.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]
