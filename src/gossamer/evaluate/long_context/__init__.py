"""Questions about long contexts: made offline, fitted to a length, answered greedily, matched.

>>> from gossamer.evaluate.long_context import TASKS
>>> TASKS["variable_tracking"].dispersion
'high'
"""

from gossamer.evaluate.long_context.fit import Sample, samples, suite
from gossamer.evaluate.long_context.rows import Row
from gossamer.evaluate.long_context.scoring import Answers, expected, generate, matches
from gossamer.evaluate.long_context.tasks import TASKS, Task, find_task, variable_tracking

__all__ = [
    "TASKS",
    "Answers",
    "Row",
    "Sample",
    "Task",
    "expected",
    "find_task",
    "generate",
    "matches",
    "samples",
    "suite",
    "variable_tracking",
]
