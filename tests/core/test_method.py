import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest

from gossamer.core import NM, GossamerError, Method, Pattern, Unstructured


@dataclass(frozen=True, kw_only=True)
class Example(Method):
    sparsity: float | None = 0.5
    pattern: Pattern = Unstructured()
    sizes: tuple[int, ...] = (1, 2)
    seed: int = 0

    def apply(self, model: Any, data: Any = None) -> Any:
        return model

    def reattach(self, model: Any, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
        return model


def test_text_becomes_a_pattern_and_numbers_floats():
    method = Example(pattern="2:4", sparsity=0)  # type: ignore[arg-type]
    assert method.pattern == NM(2, 4)
    assert isinstance(method.sparsity, float)
    assert Example(sparsity=None).sparsity is None


def test_a_method_survives_json():
    method = Example(sparsity=0.25, pattern=NM(1, 8), sizes=(3, 4), seed=7)
    stored = json.loads(json.dumps(method.to_dict()))
    assert Example.from_dict(stored) == method
    assert stored["method"] == Example.key() == Example.__module__.rpartition(".")[2]


def test_methods_are_frozen_and_varied_with_replace():
    method = Example()
    with pytest.raises(FrozenInstanceError):
        method.sparsity = 0.9  # type: ignore[misc]
    assert replace(method, sparsity=0.9).sparsity == 0.9


@pytest.mark.parametrize(
    "fields",
    [{"sparsity": 1.0}, {"sparsity": "x"}, {"pattern": "4:2"}, {"pattern": 7}, {"seed": -1}],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]):
    with pytest.raises(GossamerError):
        Example(**fields)


def test_unknown_parameters_and_other_methods_are_refused():
    with pytest.raises(GossamerError, match="did you mean sparsity"):
        Example.from_dict({"sparsit": 0.5})
    with pytest.raises(GossamerError, match="parameters of 'wanda'"):
        Example.from_dict({"method": "wanda"})
