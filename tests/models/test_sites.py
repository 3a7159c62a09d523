"""Sites are found by role on every architecture, as (out, in) views that write through."""

import pytest
import torch
import transformers
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, T5Config, T5Model

from gossamer.core import ROLES, GossamerError, UnsupportedModel
from gossamer.models import SiteMap, Tokens, find_sites
from tests.models.tiny import ARCHITECTURES, DECODERS, tiny_model

SEPARATE = {
    "attention.q": (32, 32),
    "attention.k": (16, 32),
    "attention.v": (16, 32),
    "attention.o": (32, 32),
}
WIDE = {
    "attention.q": (64, 32),
    "attention.k": (32, 32),
    "attention.v": (32, 32),
    "attention.o": (32, 64),
}
EQUAL = dict.fromkeys(SEPARATE, (32, 32))
GATED = {"mlp.gate": (64, 32), "mlp.up": (64, 32), "mlp.down": (32, 64)}
PLAIN = {"mlp.up": (64, 32), "mlp.down": (32, 64)}
FUSED = {"attention.qkv": (96, 32), "attention.o": (32, 32)}
ROUTER = {"experts.router": (4, 32)}

# What one block holds: role to (out, in).
EXPECTED = {
    "llama": SEPARATE | GATED,
    "mistral": SEPARATE | GATED,
    "qwen2": SEPARATE | GATED,
    "qwen3": WIDE | GATED,
    "gemma2": WIDE | GATED,
    "gemma3": WIDE | GATED,
    "phi3": {
        "attention.qkv": (64, 32),
        "attention.o": (32, 32),
        "mlp.gate_up": (128, 32),
        "mlp.down": (32, 64),
    },
    "gpt2": FUSED | {"mlp.up": (128, 32), "mlp.down": (32, 128)},
    "opt": EQUAL | PLAIN,
    "gpt_neox": FUSED | PLAIN,
    "mixtral": SEPARATE | {"experts.gate_up": (128, 32), "experts.down": (32, 64)} | ROUTER,
    "qwen3_moe": WIDE | {"experts.gate_up": (96, 32), "experts.down": (32, 48)} | ROUTER,
    "bert": EQUAL | PLAIN,
    "vit": EQUAL | PLAIN,
}


def tokens() -> Tokens:
    return Tokens.from_ids(
        torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_role_with_its_shape_in_every_block(name: str) -> None:
    found = find_sites(tiny_model(name))
    assert len(found.blocks) == len(found.attentions) == 2
    for block in range(2):
        roles: dict[str, list[tuple[int, int]]] = {}
        for site in found.in_block(block):
            roles.setdefault(site.role, []).append(site.shape)
        stacked = {role for role in roles if role in ("experts.gate_up", "experts.down")}
        assert roles == {
            role: [shape] * (4 if role in stacked else 1) for role, shape in EXPECTED[name].items()
        }
    assert len({site.name for site in found.sites}) == len(found.sites)
    order = [(site.block, ROLES.index(site.role)) for site in found.sites]
    assert order == sorted(order)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_hold_every_matrix_of_the_blocks_and_no_other(name: str) -> None:
    model = tiny_model(name)
    found = find_sites(model)
    storages = {s.owner(model).get_parameter(s.parameter).data_ptr() for s in found.sites}
    inside = {
        p.data_ptr()
        for path in found.blocks
        for p in model.get_submodule(path).parameters()
        if p.dim() > 1
    }
    assert storages == inside
    assert sum(site.size for site in found.sites) == sum(
        p.numel() for p in model.parameters() if p.data_ptr() in inside
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weight_is_what_multiplies_the_input(name: str) -> None:
    model = tiny_model(name)
    for site in find_sites(model).in_block(0):
        weight, owner = site.weight(model), site.owner(model)
        assert tuple(weight.shape) == site.shape
        if site.expert is not None or site.role == "experts.router":
            continue
        x = torch.randn(3, site.shape[1])
        with torch.no_grad():
            expected = owner(x) - owner(torch.zeros_like(x))
        torch.testing.assert_close(x @ weight.T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_writing_a_weight_changes_the_model(name: str) -> None:
    model, batch = tiny_model(name), {"input_ids": tokens().input_ids}
    sites = find_sites(model).sites
    with torch.no_grad():
        before = model(**batch).logits
        for site in sites:
            site.write(model, site.weight(model).clone())
        assert torch.equal(model(**batch).logits, before)
        for site in sites:
            kept = site.weight(model).clone()
            site.weight(model).zero_()
            changed = model(**batch).logits
            if site.expert is None:
                assert not torch.equal(changed, before), site.name
            site.write(model, kept)
        assert torch.equal(model(**batch).logits, before)


def test_coupled_sites() -> None:
    found = find_sites(tiny_model("llama"))
    query = found.named("model.layers.1.self_attn.q_proj")
    assert {found.named(n).role for n in query.coupled} == {
        "attention.k",
        "attention.v",
        "attention.o",
    }
    assert all(found.named(n).block == 1 for n in query.coupled)
    down = found.named("model.layers.0.mlp.down_proj")
    assert {found.named(n).role for n in down.coupled} == {"mlp.gate", "mlp.up"}
    for site in find_sites(tiny_model("mixtral")).select("experts.down"):
        (partner,) = site.coupled
        assert partner == site.name.replace("down_proj", "gate_up_proj")
    bert = find_sites(tiny_model("bert"))
    assert bert.select("mlp.up", [0])[0].coupled == (bert.select("mlp.down", [0])[0].name,)


def test_base_head_and_attention_paths() -> None:
    found = {name: find_sites(tiny_model(name)) for name in ARCHITECTURES}
    bases = {name: s.base for name, s in found.items()}
    assert bases["llama"] == "model"
    assert bases["opt"] == "model.decoder"
    assert bases["gpt2"] == "transformer"
    assert bases["gpt_neox"] == "gpt_neox"
    assert bases["bert"] == ""
    assert bases["vit"] == "vit"
    assert found["bert"].head is None
    assert found["llama"].head == "lm_head"
    assert found["bert"].attentions[1] == "encoder.layer.1.attention.self"
    assert found["gpt2"].attentions[0] == "transformer.h.0.attn"


def test_tied_weights_are_never_sites() -> None:
    model = tiny_model("gemma2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = model.lm_head.weight.data_ptr()
    assert all(s.weight(model).data_ptr() != tied for s in find_sites(model).sites)


def test_select() -> None:
    found = find_sites(tiny_model("llama"))
    assert len(found.select("attention")) == 8
    assert len(found.select(["mlp.down", "attention.o"], blocks=[1])) == 2
    assert found.select() == found.sites
    with pytest.raises(GossamerError, match=r"mlp\.dwn.*mlp\.down"):
        found.select("mlp.dwn")
    with pytest.raises(GossamerError, match="did you mean"):
        found.named("model.layers.0.mlp.down_prj")


def test_shared_experts_are_sites_and_their_gate_is_not() -> None:
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=48,
        )
    )
    shared = [s for s in find_sites(model).sites if "shared_expert" in s.name]
    assert [s.role for s in shared] == ["mlp.gate", "mlp.up", "mlp.down"]
    assert shared[2].shape == (32, 48)
    assert set(shared[0].coupled) == {shared[1].name, shared[2].name}


class Odd(nn.Module):
    """A block with attention and a matrix of no known role."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
        self.wobble = nn.Linear(4, 4)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("family", "task", "own", "roles"),
    [
        ("Olmo2", "ForCausalLM", {}, SEPARATE | GATED),
        ("StableLm", "ForCausalLM", {}, SEPARATE | GATED),
        ("Granite", "ForCausalLM", {}, SEPARATE | GATED),
        ("Starcoder2", "ForCausalLM", {}, SEPARATE | PLAIN),
        ("Phi", "ForCausalLM", {}, SEPARATE | PLAIN),
        ("Glm", "ForCausalLM", {"head_dim": 8}, SEPARATE | {"mlp.gate_up": 0, "mlp.down": 0}),
        ("Bloom", "ForCausalLM", {"n_layer": 2, "n_head": 4}, FUSED | PLAIN),
        ("GPTJ", "ForCausalLM", {"n_layer": 2, "n_head": 4, "rotary_dim": 8}, EQUAL | PLAIN),
        ("Roberta", "ForMaskedLM", {}, EQUAL | PLAIN),
        ("SiglipVision", "Model", {"image_size": 16, "patch_size": 4}, EQUAL | PLAIN),
    ],
)
def test_relatives_are_found_by_structure(
    family: str, task: str, own: dict[str, int], roles: dict[str, object]
) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL | own)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}{task}")(config)
    found = find_sites(model.to_empty(device="cpu"))
    assert len(found.blocks) == 2
    assert [s.role for s in found.in_block(1)] == sorted(roles, key=ROLES.index)


def test_unknown_models_name_what_they_hold() -> None:
    with pytest.raises(UnsupportedModel, match=r"Sequential.*0, 2"):
        find_sites(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.wobble"):
        find_sites(nn.ModuleDict({"layers": nn.ModuleList([Odd(), Odd()])}))
    t5 = T5Model(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModel, match=r"SelfAttention\.q"):
        find_sites(t5)


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(GossamerError, match="quantised"):
        find_sites(model)


def test_packed_layers_are_refused_by_name() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 64, dtype=torch.int32))

    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = Packed()
    with pytest.raises(GossamerError, match=r"layers\.1\.mlp\.up_proj is a Packed"):
        find_sites(model)


def test_weights_out_of_memory_are_refused() -> None:
    with pytest.raises(GossamerError, match="not in memory"):
        find_sites(tiny_model("llama").to("meta"))


def test_bodies_without_a_head_are_supported() -> None:
    body = tiny_model("llama").model
    found = find_sites(body)
    assert isinstance(found, SiteMap)
    assert found.base == ""
    assert found.blocks == ("layers.0", "layers.1")
