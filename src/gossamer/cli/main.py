"""``gossamer``: the command line's root, and how it ends.

Exit status 0 on success, 1 when a claim fails, 2 on input a user can mend (one line says how),
130 when interrupted.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from gossamer import __version__
from gossamer.core import GossamerError, nearest

__all__ = ["app", "main"]

app = App(
    name="gossamer",
    help="Make neural networks sparse: choose a method, measure what it costs, take it away.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help_format="markdown",
)
app.command(
    "gossamer.cli.catalogue:methods",
    help="List the methods with their papers and how their claims came out.",
)
app.command(
    "gossamer.cli.sparsify:sparsify",
    help="Apply one method to a model and save the result.",
)
app.command(
    "gossamer.cli.compare:compare",
    help="Compare methods on one model, with dense and random beside them.",
)
app.command(
    "gossamer.cli.evaluate:evaluate",
    help="Measure a model: perplexity, size, speed.",
)
app.command(
    "gossamer.cli.knee:knee",
    help="Find how sparse a model may become before its loss turns up.",
)
app.command(
    "gossamer.cli.soup:soup",
    help="Average copies of a model that were retrained under one mask.",
)
app.command(
    "gossamer.cli.accelerate:accelerate",
    help="Run a sparse model on the kernels that measure fastest, and time it.",
)
app.command(
    "gossamer.cli.measure:measure",
    help="Measure a model's activation sparsity at a price in perplexity.",
)
app.command(
    "gossamer.cli.recommend:recommend",
    help="Find the largest saving of attention that your prompts do not notice.",
)
app.command(
    "gossamer.cli.claim:claim",
    help="Run the papers' claims, scaled down.",
)
app.command(
    "gossamer.cli.recipe:app",
    name="recipe",
    help="Apply several methods to one model, as a YAML file says.",
)
app.command(
    "gossamer.cli.export:export",
    help="Write a model with zeros in the space its weights need.",
)
app.command(
    "gossamer.cli.features:app",
    name="features",
    help="Look at what a sparse dictionary found.",
)
app.command(
    "gossamer.cli.report:report",
    help="Build the page of a comparison.",
)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _advice(error: CycloptsError, words: Sequence[str]) -> str:
    """A parse error in one line, with the nearest command for a misspelt one."""
    text = _line(error)
    names = [name for name in app if not name.startswith("-")]
    if words and not words[0].startswith("-") and words[0] not in names:
        close = nearest(words[0], names)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
        return f"unknown command {words[0]!r}; {hint}"
    return f"{text.rstrip('.')}; see gossamer --help"


def _quiet() -> None:
    """Only our own lines: libraries' notices are for developers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = list(sys.argv[1:] if words is None else words)
    _quiet()
    try:
        result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"gossamer: {_advice(error, words)}", file=sys.stderr)
        return 2
    except GossamerError as error:
        print(f"gossamer: {_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngossamer: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away; point stdout elsewhere so that exiting stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) and not isinstance(result, bool) else 0
