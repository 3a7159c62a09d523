"""Verdicts on several methods and tasks."""

import numpy as np
import pytest

from gossamer.core import GossamerError
from gossamer.evaluate.verdict import judge


def lost(count, of):
    scores = np.ones(of)
    scores[:count] = 0.0
    return scores


def test_one_failed_task_is_not_averaged_away():
    dense = {"find": np.ones(200), "count": np.ones(200)}
    scores = {"dense": dense, "sparse": {"find": lost(0, 200), "count": lost(16, 200)}}
    verdicts = {v.task: v for v in judge(scores, margin=0.05)}
    assert verdicts["find"].passes
    # 8 % of one task is 4 % of the mean, below the margin of 5 %.
    assert not verdicts["count"].passes
    assert verdicts["count"].paired.drop == pytest.approx(0.08)


def test_more_tests_ask_for_more():
    one = {"dense": {"t": np.ones(170)}, "a": {"t": np.ones(170)}}
    assert judge(one)[0].passes
    many = {"dense": {"t": np.ones(170)}, **{f"m{i}": {"t": np.ones(170)} for i in range(8)}}
    assert not any(v.passes for v in judge(many))
    assert all(v.adjusted == pytest.approx(min(1, 8 * v.paired.p_value)) for v in judge(many)[:1])


def test_plain_values_and_missing_dense():
    scores = {"dense": {"t": np.ones(9)}, "a": {"t": np.ones(9)}}
    plain = judge(scores)[0].to_dict()
    assert plain["method"] == "a"
    assert plain["samples"] == 9
    with pytest.raises(GossamerError, match="no 'dense'"):
        judge({"a": {"t": np.ones(9)}})
    with pytest.raises(GossamerError, match="not answered by dense"):
        judge({"dense": {}, "a": {"t": np.ones(9)}})
