"""Kernels in a gated model: what the masks compute, step by step, for every architecture."""

import copy
import logging

import pytest
import torch
from torch import Tensor

from gossamer.core import GossamerError
from gossamer.evaluate import speed
from gossamer.kernels import measured
from gossamer.methods.activations.gated import GatedModel
from gossamer.methods.activations.teal import TEAL
from gossamer.models import Tokens
from tests.models.tiny import DECODERS, tiny_model

torch.set_num_threads(1)

WHOLE = {"llama", "mistral", "qwen2", "qwen3"}
"""Architectures of which some run as one native call."""


@pytest.fixture(autouse=True)
def _nothing_on_disk(monkeypatch):
    monkeypatch.setenv("GOSSAMER_CHOICES", "off")
    measured.forget()


def _tokens(rows: int = 8, length: int = 48, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


def _gated(name: str = "llama", sparsity: float = 0.5, **values) -> GatedModel:
    return TEAL(sparsity=sparsity, **values).apply(tiny_model(name), _tokens())


@torch.no_grad()
def _decode(model, ids: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
    """Logits of a prefill up to ``start`` and of one step for every token after it."""
    cut = None if mask is None else mask[:, :start]
    output = model(input_ids=ids[:, :start], attention_mask=cut, use_cache=True)
    cache, found = output.past_key_values, [output.logits[:, -1]]
    for t in range(start, ids.shape[1]):
        given = {} if mask is None else {"attention_mask": mask[:, : t + 1]}
        if mask is not None:
            given["position_ids"] = (mask[:, : t + 1].cumsum(1) - 1)[:, -1:]
        output = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True, **given)
        found.append(output.logits[:, -1])
    return torch.stack(found, 1)


def _double(applied: GatedModel) -> GatedModel:
    """The same thresholds at work on a float64 copy of the model."""
    model = copy.deepcopy(applied.model)
    for module in model.modules():
        vars(module).pop("_gossamer_at_work", None)
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    state = applied.state()
    return applied.method.reattach(model.double(), state.meta, state.tensors)


def _close(found: Tensor, wide: Tensor) -> None:
    off = (found.double() - wide).abs().amax(-1)
    # A channel that lies at its threshold may fall either way; that is seen at single tokens.
    assert float(off.flatten().kthvalue(max(1, int(0.8 * off.numel()))).values) < 2e-4
    assert float(off.max()) < 0.3


@pytest.mark.parametrize("name", DECODERS)
def test_kernels_and_masks_agree_with_float64(name: str) -> None:
    applied = _gated(name)
    ids = _tokens(1, 14, seed=3).input_ids
    masked = _decode(applied.model, ids, 6)
    wide = _decode(_double(applied).model, ids, 6)
    table = applied.accelerate(choice="axpy")
    assert not applied.simulated
    assert {row.chosen for row in table} == {"axpy"}
    found = _decode(applied.model, ids, 6)
    _close(masked, wide)
    _close(found, wide)
    applied.decelerate()
    assert applied.simulated
    assert torch.equal(_decode(applied.model, ids, 6), masked)
    applied.restore()


def test_llama_runs_as_one_call_and_others_layer_by_layer() -> None:
    whole = set()
    for name in DECODERS:
        applied = _gated(name)
        applied.accelerate(choice="axpy")
        assert applied._execution is not None
        if applied._execution.whole:
            whole.add(name)
            _decode(applied.model, _tokens(1, 9).input_ids, 5)
            assert applied._execution.step is not None
            assert applied._execution.step.steps >= 4, name
        applied.restore()
        assert all("forward" not in vars(m) for m in applied.model.modules())
    assert {n.partition("-")[0] for n in whole} & WHOLE
    assert any(name.startswith("llama") for name in whole)
    assert not {n for n in whole if n.startswith(("gpt", "opt", "gemma", "mixtral", "phi"))}


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_batches_with_padding_and_a_dense_prefix(batch: int) -> None:
    applied = _gated(dense_prefix=7)
    ids = _tokens(batch, 14, seed=4).input_ids
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # its dense prefix ends three steps later than the others'
    wide = _decode(_double(applied).model, ids, 6, mask)
    masked = _decode(applied.model, ids, 6, mask)
    applied.accelerate((1, batch), choice="axpy")
    found = _decode(applied.model, ids, 6, mask)
    _close(masked, wide)
    _close(found, wide)
    applied.restore()


def test_generate_is_unchanged_and_resumes_after_cropping() -> None:
    applied = _gated()
    ids = _tokens(1, 6, seed=5).input_ids
    options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    masked = applied.model.generate(ids, **options)
    beams = applied.model.generate(ids, **options, num_beams=3)
    applied.accelerate((1, 3), choice="axpy")
    # Room for keys is made anew on the way, and beams reorder the cache.
    assert torch.equal(applied.model.generate(ids, **options), masked)
    assert torch.equal(applied.model.generate(ids, **options, num_beams=3), beams)
    with torch.no_grad():
        cache = applied.model(input_ids=ids, use_cache=True).past_key_values
        step = {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True}
        first = applied.model(**step).logits
        cache.crop(-1)
        assert torch.equal(applied.model(**step).logits, first)
    applied.restore()


def test_bfloat16_steps() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    applied = TEAL(sparsity=0.4).apply(model, _tokens())
    ids = _tokens(1, 12, seed=6).input_ids
    masked = _decode(model, ids, 6)
    wide = _decode(_double(applied).model, ids, 6)
    applied.accelerate(choice="axpy")
    assert applied._execution is not None
    assert applied._execution.whole
    found = _decode(model, ids, 6)
    assert found.dtype == torch.bfloat16
    ours, theirs = ((y.double() - wide).norm(dim=-1).median() for y in (found, masked))
    assert 0 < float(ours) <= float(theirs) * 1.1  # sums inside the step are float32
    applied.restore()


def test_prefill_counting_and_gradients_stay_the_models_own() -> None:
    applied = _gated()
    data = _tokens(seed=7)
    before = applied.measure(data)
    applied.accelerate(choice="axpy")
    assert applied.measure(data) == before
    step = applied._execution and applied._execution.step
    assert step is not None
    with torch.no_grad():
        cache = applied.model(input_ids=data.input_ids[:1, :4], use_cache=True).past_key_values
    assert step.steps == 3  # the probe's
    output = applied.model(
        input_ids=data.input_ids[:1, 4:5], past_key_values=cache, output_hidden_states=True
    )
    assert step.steps == 3
    assert output.logits.requires_grad
    assert output.hidden_states is not None
    with pytest.raises(GossamerError, match="call decelerate"):
        copy.deepcopy(applied.model)
    applied.restore()


def test_dense_when_it_would_lose(caplog) -> None:
    """Layers of 32 channels take longer to start than to read, and the report says what runs."""
    applied = _gated()
    with caplog.at_level(logging.INFO, "gossamer"):
        table = applied.accelerate()
    assert {row.chosen for row in table} == {"dense"}
    assert applied.simulated
    assert "predicted ms: dense" in caplog.text
    assert "0 of 14 gated layers skip channels" in "; ".join(applied.report().notes)
    applied.restore()


def test_report_states_memory_and_what_was_read() -> None:
    applied = _gated()
    applied.accelerate(choice="axpy")
    size = sum(p.nbytes for n, p in applied.model.named_parameters() if "proj" in n)
    _decode(applied.model, _tokens(1, 20).input_ids, 4)
    report = applied.report()
    assert not report.simulated
    assert f"{size:,} bytes of channel-major weights" in report.notes[-2]
    assert applied._execution is not None
    read = applied._execution.read()
    assert read is not None
    assert 0.3 < read < 0.7
    assert f"read {read:.1%}" in report.notes[-1]
    assert speed(applied.model, prompt_tokens=4, new_tokens=2, repeats=1).decode.median > 0
    applied.decelerate()
    assert applied.report().simulated
    applied.restore()


def test_counters_count_what_the_gates_remove() -> None:
    applied = _gated("llama", 0.6, dense_prefix=0)
    ids = _tokens(1, 24, seed=8).input_ids
    applied.accelerate(choice="axpy")
    execution = applied._execution
    assert execution is not None
    assert execution.program is not None
    _decode(applied.model, ids, 23)
    counters, names = execution.program.counters.clone(), execution.program.names
    applied.decelerate()
    with torch.no_grad():
        cache = applied.model(input_ids=ids[:, :23], use_cache=True).past_key_values
        with applied.measuring():
            applied.model(input_ids=ids[:, 23:], past_key_values=cache)
    assert applied.measured is not None
    for name, (read, channels) in zip(names, counters.tolist(), strict=False):
        assert read / channels == pytest.approx(1 - applied.measured[name], abs=1.5 / channels)
    applied.restore()


def test_larger_batches_run_dense_and_bad_ones_are_refused(caplog) -> None:
    applied = _gated()
    with caplog.at_level(logging.WARNING, "gossamer"):
        table = applied.accelerate((1, 8), choice="axpy")
    assert "batch size 8 is beyond the 4 rows" in caplog.text
    assert ("all layers", "8", "dense") in {(r.layer, r.rows, r.chosen) for r in table}
    ids = _tokens(8, 8, seed=9).input_ids
    assert torch.isfinite(_decode(applied.model, ids, 6)).all()
    applied.restore()
    for sizes in ((), (0,), ("1",)):
        with pytest.raises(GossamerError, match="batch_sizes"):
            applied.accelerate(sizes)
    with pytest.raises(GossamerError, match="unknown choice"):
        applied.accelerate(choice="best")
    half = TEAL().apply(tiny_model("llama").to(torch.float64), _tokens())
    with pytest.raises(GossamerError, match=r"float64: load the model in bfloat16"):
        half.accelerate()
    half.restore()


def test_an_interrupt_while_accelerating_leaves_the_masks(monkeypatch) -> None:
    applied = _gated("gpt_neox" if "gpt_neox" in DECODERS else DECODERS[-1])
    ids = _tokens(1, 8).input_ids
    masked = _decode(applied.model, ids, 5)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        applied.accelerate(progress=stop, choice="axpy")
    assert applied.simulated
    assert all("forward" not in vars(module) for module in applied.model.modules())
    assert torch.equal(_decode(applied.model, ids, 5), masked)
    applied.restore()
