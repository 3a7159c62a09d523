"""TEAL on tiny models: what is masked, how much, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gossamer.core import GossamerError
from gossamer.methods.activations.teal import TEAL
from gossamer.models import Inputs, Tokens, find_sites
from gossamer.models.store import read_stages
from tests.models.tiny import ARCHITECTURES, DECODERS, tiny_model

torch.set_num_threads(1)


def _tokens(rows: int = 8, length: int = 64, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.from_ids(torch.randint(3, 128, (rows, length), generator=generator))


def _data(name: str, seed: int = 0):
    if name == "vit":
        generator = torch.Generator().manual_seed(seed)
        return Inputs({"pixel_values": torch.randn(24, 3, 16, 16, generator=generator)})
    return _tokens(seed=seed)


def _output(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def _hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) + sum(
        "forward" in vars(m) for m in model.modules()
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    model, data = tiny_model(name), _data(name)
    batch = next(data.batches(4))
    dense = _output(model, **batch)
    applied = TEAL(sparsity=0.4).apply(model, data)
    masked = _output(model, **batch)
    measured = applied.measure(_data(name, seed=1))
    wanted = {s.role for s in find_sites(model).sites} - {"experts.router"}
    applied.restore()
    assert not torch.allclose(dense, masked, atol=1e-3)
    assert torch.isfinite(masked).all()
    assert {gate.role for gate in applied.gates.values()} == wanted
    # Masked layers feed smaller activations to later ones, much so in a random model.
    assert all(0.35 < share < 0.65 for share in measured.values())
    assert _hooks(model) == 0
    assert torch.equal(_output(model, **batch), dense)


@pytest.mark.parametrize("name", DECODERS)
def test_every_threshold_removes_the_target_share_of_unseen_text(name: str) -> None:
    model = tiny_model(name)
    seen, unseen = _tokens(16), _tokens(16, seed=1)
    method = TEAL(sparsity=0.4)
    with method.apply(model, seen) as applied:
        state = applied.state()
    for gate in applied.gates.values():
        # Alone on the dense model: the input is as calibrated, but for chance.
        meta = {"gates": [g for g in state.meta["gates"] if g["name"] == gate.name]}
        with method.reattach(model, meta, state.tensors) as alone:
            shares = alone.measure(seen)[gate.name], alone.measure(unseen)[gate.name]
        if name == "opt" and gate.role == "mlp.down":
            # ReLU leaves more exact zeros than the target, and they are skipped as well.
            assert min(shares) > 0.4
            continue
        assert shares[0] == pytest.approx(0.4, abs=0.01)
        # Attention mixes the tokens of a text, so its output varies with the texts drawn.
        chance = 0.06 if gate.role == "attention.o" else 0.02
        assert shares[1] == pytest.approx(0.4, abs=chance)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_sparsity_zero_is_the_dense_model_bit_for_bit(name: str) -> None:
    model, data = tiny_model(name), _tokens()
    dense = _output(model, input_ids=data.input_ids)
    for allocation in ("uniform", "greedy"):
        with TEAL(sparsity=0.0, allocation=allocation).apply(model, data) as applied:
            assert torch.equal(_output(model, input_ids=data.input_ids), dense)
            assert applied.report().sparsity == 0.0


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_prefix_is_dense_and_the_next_token_is_not(prefix: int) -> None:
    model, data = tiny_model("llama"), _tokens()
    dense = _output(model, input_ids=data.input_ids)
    with TEAL(sparsity=0.6, dense_prefix=prefix).apply(model, data):
        masked = _output(model, input_ids=data.input_ids)
    assert torch.equal(masked[:, :prefix], dense[:, :prefix])
    assert not torch.allclose(masked[:, prefix], dense[:, prefix], atol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_chunks_and_decoding_give_the_logits_of_the_lone_row(name: str, side: str) -> None:
    model = tiny_model(name)
    ids = _tokens(2, 12).input_ids
    mask = torch.ones_like(ids)
    short = slice(4, 12) if side == "left" else slice(0, 8)
    mask[1] = 0
    mask[1, short] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with TEAL(sparsity=0.5, dense_prefix=3).apply(model, _tokens()), torch.no_grad():
        alone = [
            model(input_ids=ids[:1]).logits[0],
            model(input_ids=ids[1:, short]).logits[0],
        ]
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        cache, parts = None, []
        # A prefill in chunks that cut the prefix, then decoding token by token.
        for start, stop in [(0, 2), (2, 9), (9, 10), (10, 11), (11, 12)]:
            out = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
    for logits in (whole, torch.cat(parts, 1)):
        torch.testing.assert_close(logits[0], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1, short], alone[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_generate_on_a_padded_batch_equals_each_row_alone(name: str) -> None:
    model = tiny_model(name)
    ids = _tokens(2, 9).input_ids
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with TEAL(sparsity=0.5, dense_prefix=2).apply(model, _tokens()):
        both = model.generate(ids, attention_mask=mask, **options)
        first = model.generate(ids[:1], attention_mask=mask[:1], **options)
        second = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(both[0], first[0])
    assert torch.equal(both[1, 4:], second[0])


def test_encoders_find_the_prefix_behind_left_padding() -> None:
    model, data = tiny_model("bert"), _tokens(1, 8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), data.input_ids], 1)
    mask = (torch.arange(11) >= 3).long()[None]
    with TEAL(sparsity=0.5, dense_prefix=2).apply(model, _tokens()):
        alone = _output(model, input_ids=data.input_ids)
        ids = (mask.cumsum(1) - 1).clamp_min(0)
        shifted = _output(model, input_ids=padded, attention_mask=mask, position_ids=ids)
    torch.testing.assert_close(shifted[:, 3:], alone, rtol=1e-4, atol=1e-4)


def test_calibration_leaves_padding_out() -> None:
    model, data = tiny_model("llama"), _tokens()
    mask = torch.ones_like(data.input_ids)
    padded = torch.cat([data.input_ids, torch.zeros_like(data.input_ids)], 1)
    both = Tokens(padded, torch.cat([mask, torch.zeros_like(mask)], 1))
    with TEAL(sparsity=0.5).apply(model, data) as plain:
        cuts = plain.state().tensors
    with TEAL(sparsity=0.5).apply(model, both) as applied:
        for name, cut in applied.state().tensors.items():
            torch.testing.assert_close(cut, cuts[name], rtol=3e-3, atol=0)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_stored_thresholds_give_the_same_logits(name: str) -> None:
    model, data = tiny_model(name), _tokens()
    method = TEAL(sparsity=0.5, dense_prefix=2)
    with method.apply(model, data) as applied:
        state, masked = applied.state(), _output(model, input_ids=data.input_ids)
    fresh = tiny_model(name)
    with method.reattach(fresh, state.meta, state.tensors) as again:
        assert torch.equal(_output(fresh, input_ids=data.input_ids), masked)
        assert again.report().to_dict() == applied.report().to_dict()
    assert _hooks(fresh) == 0


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_saved_folder_restores_the_masked_model(name: str, tmp_path: Path) -> None:
    model, data = tiny_model(name), _tokens()
    dense = _output(model, input_ids=data.input_ids)
    with TEAL(sparsity=0.5, allocation="greedy", step=0.5).apply(model, data) as applied:
        masked = _output(model, input_ids=data.input_ids)
        applied.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert torch.equal(_output(loaded, input_ids=data.input_ids), dense)
    (stage,) = read_stages(tmp_path / "model")
    with TEAL.from_dict(stage.method).reattach(loaded, stage.meta, stage.tensors):
        assert torch.equal(_output(loaded, input_ids=data.input_ids), masked)


def test_thresholds_of_another_model_are_refused() -> None:
    with TEAL().apply(tiny_model("llama"), _tokens()) as applied:
        state = applied.state()
    # Without a fingerprint the places and sizes still tell.
    plan = {name: value for name, value in state.meta.items() if name != "model"}
    with pytest.raises(GossamerError, match="does not have"):
        TEAL().reattach(tiny_model("gpt2"), plan, state.tensors)
    wider = tiny_model("qwen3")
    for meta in (plan, state.meta):
        with pytest.raises(GossamerError, match="calibrated on"):
            TEAL().reattach(wider, meta, state.tensors)
    assert _hooks(wider) == 0


def test_same_data_same_thresholds_whatever_the_batch_size() -> None:
    model, data = tiny_model("llama"), _tokens()
    method = TEAL(sparsity=0.5, allocation="greedy", step=0.2)

    def stored(method: TEAL, **options: int):
        with method.apply(model, data, **options) as applied:
            return applied.state()

    first, second = stored(method), stored(method)
    assert first.meta == second.meta
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    uniform = [stored(TEAL(sparsity=0.5), batch_size=b) for b in (1, 8)]
    for name, cut in uniform[0].tensors.items():
        torch.testing.assert_close(cut, uniform[1].tensors[name], rtol=3e-3, atol=0)


def test_an_error_while_attaching_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("full")

    monkeypatch.setattr("gossamer.methods.activations.gates.Gates._attach", fail)
    with pytest.raises(RuntimeError, match="full"):
        TEAL().apply(model, _tokens())
    assert _hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_report_states_what_a_token_reads(name: str) -> None:
    model, data = tiny_model(name), _tokens()
    with TEAL(sparsity=0.25).apply(model, data) as applied:
        report = applied.report()
        assert report.simulated
        assert report.sparsity == pytest.approx(0.25)
        # Two of four experts run for a token.
        gated = sum(
            s.size * (0.5 if s.expert is not None else 1)
            for s in find_sites(model).sites
            if s.role != "experts.router"
        )
        assert report.size == gated
        assert applied.weight_bytes_saved() == int(0.25 * 4 * gated)
        assert any("75.0%" in note and "head" in note for note in report.notes)
        applied.measure(_tokens(seed=3))
        assert applied.report().sparsity == pytest.approx(0.25, abs=0.02)
        assert applied.report().sparsity != 0.25


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"allocation": "evenly"}, "allocation is 'evenly'"),
        ({"dense_prefix": -1}, "dense_prefix is -1"),
        ({"step": 0.0}, "step is 0.0"),
    ],
)
def test_impossible_parameters_are_refused(values: dict, message: str) -> None:
    with pytest.raises(GossamerError, match=message):
        TEAL(**values)


def test_round_trip_as_plain_values() -> None:
    method = TEAL(sparsity=0.3, allocation="greedy", dense_prefix=4, step=0.1)
    assert TEAL.from_dict(method.to_dict()) == method
