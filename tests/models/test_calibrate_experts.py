"""Every expert of a stack is measured on the tokens routed to it, and on no others."""

import pytest
import torch
from torch import Tensor, nn

from gossamer.core import Stat
from gossamer.models import Block, Tokens, find_sites, stream
from tests.models.tiny import tiny_model

L2 = frozenset({Stat.INPUT_L2})


def padded_text() -> Tokens:
    ids = torch.randint(3, 128, (5, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 20, dtype=torch.bool)
    mask[1, 13:] = False
    mask[4, 17:] = False
    return Tokens(ids, mask)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_see_their_routed_tokens(name: str) -> None:
    model, data = tiny_model(name), padded_text()
    sites = find_sites(model)
    taken: dict[str, list[tuple[Tensor, Tensor]]] = {}
    valid: list[Tensor] = []
    handles = []
    for path in {s.module for s in sites.select(["experts.down"])}:

        def hook(_m: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            taken.setdefault(path, []).append((args[0][valid[0]], args[1][valid[0]]))

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in data.batches(2):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            valid[:] = [mask.bool().flatten()]
            model(**batch)
    for handle in handles:
        handle.remove()
    stats: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def visit(block: Block) -> None:
        stats.update({n: v[Stat.INPUT_L2] for n, v in block.stats.items()})
        counts.update(block.tokens)

    stream(model, data, L2, visit, batch_size=2)
    for path, batches in taken.items():
        module = model.get_submodule(path)
        x = torch.cat([hidden for hidden, _ in batches]).double()
        index = torch.cat([chosen for _, chosen in batches])
        for e in range(4):
            own = x[(index == e).any(1)]
            first, second = module.gate_up_proj[e].detach().double().chunk(2)
            inner = nn.functional.silu(own @ first.T) * (own @ second.T)
            up, down = f"{path}.gate_up_proj[{e}]", f"{path}.down_proj[{e}]"
            assert counts[up] == counts[down] == len(own)
            torch.testing.assert_close(stats[up], own.norm(dim=0).float())
            torch.testing.assert_close(stats[down], inner.norm(dim=0).float(), rtol=1e-4, atol=1e-6)
    assert sum(counts[s.name] for s in sites.select("experts.down", [0])) == 2 * data.count


def test_experts_no_token_reached_are_named() -> None:
    model = tiny_model("mixtral")
    one_token = Tokens.from_ids(torch.tensor([[5]]))  # goes to 2 of the 4 experts of each block
    said: list[str] = []
    seen: dict[str, Block] = {}
    result = stream(
        model,
        one_token,
        L2,
        lambda b: seen.update({str(b.index): b}),
        progress=lambda _d, _t, what: said.append(what),
    )
    unseen = [n for b in seen.values() for n, count in b.tokens.items() if not count]
    assert list(result.unseen) == unseen
    assert len(unseen) == 8
    for name in unseen:
        block = next(b for b in seen.values() if name in b.stats)
        assert not block.stats[name][Stat.INPUT_L2].any()
    assert any("no token reached" in line and unseen[0] in line for line in said)
