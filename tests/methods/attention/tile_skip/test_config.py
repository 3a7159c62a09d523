import json

import pytest
from transformers import AutoConfig

from gossamer.core import GossamerError
from gossamer.methods.attention.tile_skip import (
    Scale,
    read_scales,
    scales_of,
    sparse_attention_config,
    write_scales,
)
from tests.models.tiny import tiny_model

MODELOPT = {
    "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": ["LlamaAttention"]}},
    "threshold_scale_factor": {
        "formula": "a * exp(b * target_sparsity)",
        "prefill": {"a": 7.93, "b": 8.61},
        "decode": {"a": 0.12, "b": 9.85},
    },
    "producer": {"name": "modelopt", "version": "0.37.0"},
}


def test_modelopt_s_layout_is_read_and_written():
    scales = scales_of(MODELOPT, "here")
    assert scales == {"prefill": Scale(7.93, 8.61), "decode": Scale(0.12, 9.85)}
    again = sparse_attention_config(scales, 0.5, ["LlamaAttention"])
    assert again["config_groups"] == MODELOPT["config_groups"]
    assert again["threshold_scale_factor"] == MODELOPT["threshold_scale_factor"]
    assert again["target_sparse_ratio"] == {"prefill": 0.5, "decode": 0.5}


def test_saved_models_carry_their_calibration(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m")
    write_scales(tmp_path / "m", {"decode": Scale(0.5, 2.0)}, 0.4, model)
    assert read_scales(tmp_path / "m") == {"decode": Scale(0.5, 2.0)}
    assert read_scales(tmp_path / "m" / "config.json") == {"decode": Scale(0.5, 2.0)}
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert scales_of(config.sparse_attention_config, "it") == {"decode": Scale(0.5, 2.0)}
    groups = json.loads((tmp_path / "m" / "config.json").read_text())["sparse_attention_config"]
    assert groups["config_groups"]["group_0"]["targets"] == ["LlamaAttention"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no sparse_attention_config"),
        ({"config_groups": {"g": {"sparse_algo": "vsa"}}}, "only softmax_skip"),
        ({**MODELOPT, "threshold_scale_factor": {}}, "no calibrated a and b"),
    ],
)
def test_other_configs_are_refused(config, message):
    with pytest.raises(GossamerError, match=message):
        scales_of(config, "here")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(GossamerError, match="no readable config"):
        read_scales(tmp_path / "config.json")
    with pytest.raises(GossamerError, match="save the model first"):
        write_scales(tmp_path, {}, 0.5, tiny_model("llama"))
