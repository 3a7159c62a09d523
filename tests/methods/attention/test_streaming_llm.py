import json
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

from gossamer.core import GossamerError
from gossamer.core.pattern import Window
from gossamer.methods.attention.streaming_llm import StreamingLLM
from gossamer.models import Tokens
from tests.models.tiny import DECODERS, ENCODERS, tiny_model

BACKENDS = ("auto", "reference", "window")


@pytest.fixture(autouse=True)
def tables_are_left_alone():
    before = [set(t._global_mapping) for t in (AttentionInterface, AttentionMaskInterface)]
    yield
    after = [set(t._global_mapping) for t in (AttentionInterface, AttentionMaskInterface)]
    assert after == before


def tokens(rows=2, length=24, seed=0):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, mask=None):
    return model(ids, attention_mask=mask, use_cache=False).logits


def dense_logits(model, ids):
    """Of the model's own eager attention: the fused one of older versions drops the softcap."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return logits(model, ids)
    finally:
        model.set_attn_implementation(own)


def generator_of(name):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


# -- every architecture ----------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_window_is_the_dense_model(name, backend):
    model, ids = tiny_model(name), tokens()
    dense, before = dense_logits(model, ids), logits(model, ids)
    with StreamingLLM(recent=24, backend=backend).apply(model, ids):
        torch.testing.assert_close(logits(model, ids), dense, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", DECODERS)
def test_backends_agree_and_differ_from_dense(name):
    model, ids = tiny_model(name), tokens(length=70)
    got = {}
    for backend in BACKENDS:
        with StreamingLLM(sink=2, recent=5, backend=backend).apply(model, ids):
            got[backend] = logits(model, ids)
    torch.testing.assert_close(got["window"], got["reference"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got["auto"], got["reference"], atol=2e-5, rtol=1e-5)
    dense = dense_logits(model, ids)
    assert (got["reference"][:, 7:] - dense[:, 7:]).abs().amax() > 0.1
    # The first sink + recent queries lose no key.
    torch.testing.assert_close(got["reference"][:, :7], dense[:, :7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_reported_pairs_are_those_the_model_reads(name, monkeypatch):
    """Sliding layers keep the model's own window: measured on the masks that really ran."""
    from gossamer.methods.attention import applied

    seen = []
    run = applied.run

    def spy(name, call, index):
        seen.append(index.pairs())
        return run(name, call, index)

    monkeypatch.setattr(applied, "run", spy)
    model, ids = tiny_model(name), tokens(rows=1, length=30)
    with StreamingLLM(sink=2, recent=5).apply(model, ids) as work:
        logits(model, ids)
        rows = work.report().rows
    assert [(r.size, round(r.size * (1 - r.sparsity))) for r in rows] == [(b, a) for a, b in seen]


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_and_without_a_cache_is_one(name):
    model, ids = generator_of(name), tokens(length=20)
    with StreamingLLM(sink=2, recent=5).apply(model, ids) as work:
        want = ids
        for _ in range(12):
            step = logits(model, want)[:, -1].argmax(-1, keepdim=True)
            want = torch.cat([want, step], dim=1)
        for options in (
            {},
            {"prefill_chunk_size": 6},
            {"cache_implementation": "static"},
            {"use_cache": False},
        ):
            got = model.generate(ids, max_new_tokens=12, do_sample=False, **options)
            assert torch.equal(got, want), options
        assert work.ran["masked"] > work.ran["dense"]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_refused(name):
    with pytest.raises(GossamerError, match="bidirectional"):
        StreamingLLM(recent=4).apply(tiny_model(name))


# -- caches, padding, decoding ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_and_chunks_equal_one_shot(name, backend):
    model, ids = tiny_model(name), tokens(length=23)
    with torch.no_grad(), StreamingLLM(sink=2, recent=5, backend=backend).apply(model, ids):
        want = logits(model, ids)
        for cuts in ([23], [9, 14], [1] * 23, [16, *[1] * 7], [2, 2, 19]):
            cache, parts, start = None, [], 0
            for cut in cuts:
                out = model(ids[:, start : start + cut], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, start + cut
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(name, backend):
    model, ids = tiny_model(name), tokens(length=20)
    mask = torch.ones_like(ids)
    left, right = mask.clone(), mask.clone()
    left[1, :6], right[1, 14:] = 0, 0
    turned = ids.clone()
    turned[1] = ids[1].roll(-6)
    with StreamingLLM(sink=3, recent=4, backend=backend).apply(model, ids):
        alone = logits(model, ids[1:, 6:])[0]
        other = logits(model, ids[:1])[0]
        positions = (left.cumsum(1) - 1).clamp_min(0)
        takes_positions = name != "opt"
        with torch.no_grad():
            more = {"position_ids": positions} if takes_positions else {}
            padded = model(ids, attention_mask=left, use_cache=False, **more).logits
        torch.testing.assert_close(padded[1, 6:], alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(padded[0], other, atol=2e-5, rtol=1e-5)
        padded = logits(model, turned, right)
        torch.testing.assert_close(padded[1, :14], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_generate_with_left_padding_samples_and_beams(name):
    model, ids = generator_of(name), tokens(length=20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    ways = (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 1.3},
    )
    with StreamingLLM(sink=2, recent=5).apply(model, ids):
        for way in ways:
            got = []
            for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
                torch.manual_seed(3)
                out = model.generate(ids, attention_mask=mask, max_new_tokens=10, **way, **options)
                got.append(out)
            assert torch.equal(got[0], got[1]), way
            assert torch.equal(got[0], got[2]), way
        alone = model.generate(ids[1:, 6:], max_new_tokens=10, do_sample=False)
        batch = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
        assert torch.equal(batch[1, 20:], alone[0, 14:])


def test_assisted_generation():
    model, helper, ids = generator_of("llama"), generator_of("qwen2"), tokens(rows=1)
    with StreamingLLM(sink=2, recent=5).apply(model, ids):
        want = model.generate(ids, max_new_tokens=12, do_sample=False)
        got = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=helper)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_later_tokens_never_change_earlier_logits(name, backend):
    model, ids = tiny_model(name), tokens(rows=1, length=80)
    changed = ids.clone()
    changed[0, 50:] = (changed[0, 50:] + 17) % 125 + 3
    with StreamingLLM(sink=2, recent=7, backend=backend).apply(model, ids):
        torch.testing.assert_close(logits(model, ids)[:, :50], logits(model, changed)[:, :50])
        assert not torch.allclose(logits(model, ids)[:, 50:], logits(model, changed)[:, 50:])


def test_what_lies_between_sinks_and_window_is_not_read():
    """One block, so information has no second hop."""
    config = tiny_model("llama").config
    config.num_hidden_layers = 1
    model, ids = LlamaForCausalLM(config).eval(), tokens(rows=1, length=40)
    changed = ids.clone()
    changed[0, 2:30] = 5
    with StreamingLLM(sink=2, recent=10).apply(model, ids):
        torch.testing.assert_close(logits(model, ids)[:, 39], logits(model, changed)[:, 39])
        assert not torch.allclose(logits(model, ids)[:, 38], logits(model, changed)[:, 38])


def test_packed_sequences_run_like_single_ones():
    model, ids = tiny_model("llama"), tokens(rows=1, length=30)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad(), StreamingLLM(sink=2, recent=4).apply(model, ids):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([logits(model, ids[:, :12]), logits(model, ids[:, 12:])], dim=1)
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=1e-5)


def test_training_mode_and_gradients_just_work():
    model, ids = tiny_model("llama"), tokens()
    model.config.attention_dropout = 0.1
    with StreamingLLM(recent=5, backend="window").apply(model, ids):
        model.train()
        model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_half_precision():
    model, ids = tiny_model("llama").to(torch.bfloat16), tokens(length=70)
    got = []
    for backend in ("reference", "window"):
        with StreamingLLM(recent=6, backend=backend).apply(model, ids):
            got.append(logits(model, ids))
    assert got[0].dtype == torch.bfloat16
    assert (got[0] - got[1]).abs().max() < 0.05 * got[0].abs().max()


# -- installing and undoing ------------------------------------------------------------------


def test_models_that_share_a_config_are_told_apart():
    first = tiny_model("llama")
    second = LlamaForCausalLM(first.config).eval()
    config, ids = first.config, tokens()
    want = logits(second, ids)
    with StreamingLLM(recent=3).apply(first, ids):
        assert config._attn_implementation == "sdpa"
        assert torch.equal(logits(second, ids), want)
        with StreamingLLM(recent=9).apply(second, ids):
            assert not torch.equal(logits(second, ids), want)
    assert first.config is config
    assert all(m.config is config for m in first.modules() if hasattr(m, "config"))
    assert torch.equal(logits(second, ids), want)


def test_restoring_is_complete_and_may_be_repeated():
    model, ids = tiny_model("gemma2"), tokens()
    before = {name: vars(m).get("config") for name, m in model.named_modules()}
    want = logits(model, ids)
    work = StreamingLLM(recent=3).apply(model, ids)
    assert not torch.equal(logits(model, ids), want)
    work.restore()
    work.restore()
    for name, module in model.named_modules():
        assert vars(module).get("config") is before[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert torch.equal(logits(model, ids), want)


def test_an_error_inside_restores_too():
    model, ids = tiny_model("llama"), tokens()
    want = logits(model, ids)
    with pytest.raises(RuntimeError, match="stop"), StreamingLLM(recent=3).apply(model, ids):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), want)


def test_a_failed_installation_leaves_nothing(monkeypatch):
    model, ids = tiny_model("llama"), tokens()
    config = model.config

    def refuse(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    with pytest.raises(RuntimeError, match="no"):
        StreamingLLM(recent=3).apply(model, ids)
    assert model.config is config
    assert model.model.config is config


def test_a_second_method_on_one_model_is_refused():
    model, ids = tiny_model("llama"), tokens()
    with StreamingLLM(recent=3).apply(model, ids):
        with pytest.raises(GossamerError, match="restore"):
            StreamingLLM(recent=4).apply(model, ids)
        logits(model, ids)


def test_what_is_no_model_is_refused():
    with pytest.raises(GossamerError):
        StreamingLLM(recent=3).apply(torch.nn.Linear(3, 3))


def test_arguments_no_executor_knows_are_refused():
    model, ids = tiny_model("llama"), tokens()
    tensor = torch.zeros(1, 4, 3, 8)
    with StreamingLLM(recent=3).apply(model, ids) as work:
        module = model.model.layers[0].self_attn
        with pytest.raises(GossamerError, match="position_bias"):
            work._attention(module, tensor, tensor, tensor, None, position_bias=tensor)


def test_the_saved_config_does_not_name_it(tmp_path):
    model, ids = tiny_model("llama"), tokens()
    with StreamingLLM(recent=3).apply(model, ids):
        model.save_pretrained(tmp_path)
    assert "gossamer" not in (tmp_path / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


# -- parameters, report, state ---------------------------------------------------------------


def test_sparsity_counts_causal_pairs_at_the_data_s_length():
    model = tiny_model("llama")
    data = Tokens.from_ids(tokens(length=100))
    for sparsity in (0.3, 0.5, 0.8):
        with StreamingLLM(sparsity=sparsity).apply(model, data) as work:
            report = work.report()
        assert sparsity <= report.sparsity < sparsity + 0.02
        assert report.rows[0].size == 5050
        assert report.unit == "attention pairs"
        recent = work.selector.recent
        assert recent == Window.for_sparsity(sparsity, 100).recent
        assert Window(4, recent + 1).sparsity_at(100) < sparsity
        assert work.method == StreamingLLM(sparsity=sparsity, length=100)


def test_length_may_be_given():
    with StreamingLLM(sparsity=0.5, length=64).apply(
        tiny_model("llama"), tokens(length=100)
    ) as work:
        assert work.selector.recent == Window.for_sparsity(0.5, 64).recent
    with StreamingLLM(sparsity=0.5).apply(tiny_model("llama")) as work:
        assert work.length == 128


def test_sparsity_zero_is_dense_at_any_length():
    model, ids = tiny_model("llama"), tokens(length=90)
    dense = logits(model, ids)
    with StreamingLLM(sparsity=0.0).apply(model, ids[:, :10]) as work:
        assert torch.equal(logits(model, ids), dense)
        assert work.report().sparsity == 0.0
        assert not work.simulated


def test_simulated_says_what_ran():
    model, ids = tiny_model("llama"), tokens(length=100)
    with StreamingLLM(recent=8, backend="reference").apply(model, ids) as work:
        assert work.simulated
        logits(model, ids)
        assert work.ran == {"reference": 2}
    with StreamingLLM(recent=8).apply(model, ids) as work:
        assert not work.simulated
        logits(model, ids)
        assert work.ran == {"window": 2}
        assert not work.simulated
        logits(model, ids[:, :20])
        assert work.simulated
        assert any("masked 2, window 2" in note for note in work.report().notes)
    json.dumps(work.report().to_dict())


def test_key_value_bytes_of_a_token():
    ids = tokens(length=100)
    with StreamingLLM(sink=2, recent=6).apply(tiny_model("llama"), ids) as work:
        # Two blocks, two key-value heads of width 8, keys and values, four bytes.
        row = 2 * 2 * 8 * 2 * 4
        assert work.kv_bytes(100) == (100 * row, 8 * row)
        assert work.kv_bytes(1) == (row, row)
    with StreamingLLM(sink=2, recent=6).apply(tiny_model("gpt2"), ids) as work:
        assert work.kv_bytes(100).kept == 8 * 2 * 4 * 8 * 2 * 4
    with StreamingLLM(sink=2, recent=20).apply(tiny_model("mistral"), ids) as work:
        # The model's own window of 8 is the smaller one.
        assert work.kv_bytes(100) == (8 * row, 8 * row)


def test_state_attaches_again_without_data():
    model, ids = tiny_model("llama"), tokens(length=60)
    with StreamingLLM(sparsity=0.6).apply(model, ids) as work:
        want, state, method = logits(model, ids), work.state(), work.method
    meta = json.loads(json.dumps(state.meta))
    again = StreamingLLM.from_dict(method.to_dict())
    assert again == method
    with again.reattach(model, meta, state.tensors) as work:
        assert torch.equal(logits(model, ids), want)
        assert work.state().meta == state.meta


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 0.5, "recent": 3}, "give one"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"recent": 0}, "recent"),
        ({"recent": 2.5}, "recent"),
        ({"sink": -1}, "sink"),
        ({"backend": "windows"}, "window"),
        ({"length": 0}, "length"),
    ],
)
def test_impossible_parameters(values, message):
    with pytest.raises(GossamerError, match=message):
        StreamingLLM(**values)


def test_a_sparsity_the_sinks_alone_exceed():
    with pytest.raises(GossamerError, match="at most"):
        StreamingLLM(sparsity=0.95, sink=30).apply(tiny_model("llama"), tokens(length=40))


def test_default_and_variation():
    assert StreamingLLM().sparsity == 0.5
    assert replace(StreamingLLM(), sparsity=0.7).sparsity == 0.7
    assert StreamingLLM.key() == "streaming_llm"


def test_calibration_after_it_sees_the_window():
    """The driver stores masks as tensors and replays them: the window must survive that."""
    from gossamer.models import stream

    model, data = tiny_model("llama"), Tokens.from_ids(tokens(rows=4, length=30))
    outputs = []
    with torch.no_grad(), StreamingLLM(sink=1, recent=3).apply(model, data):
        want = model.model(data.input_ids, use_cache=False, output_hidden_states=True)

        def visit(block):
            for batch in block.batches():
                outputs.append(block.run(batch))

        stream(model, data, frozenset(), visit, batch_size=4)
    torch.testing.assert_close(outputs[0], want.hidden_states[1], atol=1e-5, rtol=1e-5)
