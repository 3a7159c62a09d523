"""The session of docs/training.md on sparse pre-training runs as printed."""

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).parents[4] / "docs" / "training.md"


def test_the_session_of_the_page_runs_as_printed():
    text = PAGE.read_text(encoding="utf-8")
    sessions = "\n".join(re.findall(r"```pycon\n(.*?)```", text, re.DOTALL))
    assert "fit_scaling_law" in sessions
    example = doctest.DocTestParser().get_doctest(sessions, {}, PAGE.name, None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
