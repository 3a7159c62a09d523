"""Sites: the matrices of a Hugging Face transformer, found by the role they play.

This is the only place that knows how architectures name their parts. It holds no list of
architectures: blocks are found by structure and roles by the names of children, so a relative of
a known model is served as well. Embeddings and heads are never sites, hence tied weights are not.
"""

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gossamer.core import ROLES, GossamerError, Site, UnsupportedModel, unknown

__all__ = ["SiteMap", "find_sites"]

# In an attention module, and in the submodules BERT and its kin nest there.
_ATTENTION = r"(?:.*\.)?\w*(?:attn|attention)\w*\.(?:self\.|attention\.|output\.)?"
_ANY = r"(?:.*\.)?"
# Role by the path inside a block; the first match wins.
_RULES: tuple[tuple[str, str], ...] = (
    (_ATTENTION + r"(?:q_proj|query|q_lin|wq)", "attention.q"),
    (_ATTENTION + r"(?:k_proj|key|k_lin|wk)", "attention.k"),
    (_ATTENTION + r"(?:v_proj|value|v_lin|wv)", "attention.v"),
    (_ATTENTION + r"(?:qkv_proj|c_attn|query_key_value|qkv|Wqkv)", "attention.qkv"),
    (_ATTENTION + r"(?:o_proj|out_proj|dense|c_proj|out_lin|wo|Wo)", "attention.o"),
    (_ANY + r"(?:gate_proj|experts\.\d+\.w1)", "mlp.gate"),
    (_ANY + r"(?:up_proj|fc1|c_fc|fc_in|dense_h_to_4h|lin1|experts\.\d+\.w3)", "mlp.up"),
    (_ANY + r"intermediate\.dense", "mlp.up"),
    (_ANY + r"(?:gate_up_proj|Wi)", "mlp.gate_up"),
    (_ANY + r"(?:down_proj|fc2|c_proj|fc_out|dense_4h_to_h|lin2|Wo|experts\.\d+\.w2)", "mlp.down"),
    (_ANY + r"output\.dense", "mlp.down"),
    (r"(?:mlp|block_sparse_moe|feed_forward|moe)\.(?:gate|router)(?:\.layer)?", "experts.router"),
)
_EXPERTS = {
    "gate_up_proj": "experts.gate_up",
    "up_proj": "experts.gate_up",
    "down_proj": "experts.down",
}


@dataclass(frozen=True)
class SiteMap:
    """Where a model's matrices are.

    Parameters
    ----------
    blocks : paths of the blocks in the order they run.
    sites : every matrix, block by block, in the order of :data:`gossamer.core.ROLES`.
    attentions : for each block the path of the module that calls the attention function.
    base : path of the module that owns the blocks and receives the model's inputs, ``""`` for
        the model itself.
    head : path of the language-model head, or None.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    attentions: tuple[str, ...]
    base: str
    head: str | None

    def in_block(self, index: int) -> tuple[Site, ...]:
        """Sites of one block."""
        return tuple(site for site in self.sites if site.block == index)

    def named(self, name: str) -> Site:
        """The site of that name.

        Raises
        ------
        GossamerError
            If there is none, with the nearest names.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise unknown("site", name, [site.name for site in self.sites])

    def select(
        self,
        roles: str | Iterable[str] | None = None,
        blocks: Iterable[int] | None = None,
    ) -> tuple[Site, ...]:
        """Sites of these roles in these blocks; None means all.

        Parameters
        ----------
        roles : full roles such as ``"mlp.down"``, or their first half, such as ``"mlp"``.
        """
        wanted = None if roles is None else {roles} if isinstance(roles, str) else set(roles)
        known = (*ROLES, *dict.fromkeys(role.partition(".")[0] for role in ROLES))
        for role in wanted or ():
            if role not in known:
                raise unknown("role", role, known)
        inside = None if blocks is None else set(blocks)
        return tuple(
            site
            for site in self.sites
            if (wanted is None or site.role in wanted or site.role.partition(".")[0] in wanted)
            and (inside is None or site.block in inside)
        )


def find_sites(model: nn.Module) -> SiteMap:
    """Find the blocks of a transformer and the role of every matrix in them.

    Raises
    ------
    UnsupportedModel
        If no list of blocks with attention is found, or a block holds a matrix of unknown role;
        names the modules found.
    GossamerError
        If the weights are quantised or not in memory.
    """
    _check_weights(model)
    stem, blocks = _blocks(model)
    paths = tuple(f"{stem}.{i}" if stem else str(i) for i in range(len(blocks)))
    sites: list[Site] = []
    attentions: list[str] = []
    for index, (path, block) in enumerate(zip(paths, blocks, strict=True)):
        found = _block_sites(index, path, block)
        sites += found
        attentions.append(_attention(path, block))
    return SiteMap(paths, tuple(sites), tuple(attentions), _base(model, stem), _head(model))


def _check_weights(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise GossamerError(
            "the model's weights are quantised, so they cannot be pruned or measured; "
            "load the model in bfloat16 or float32"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise GossamerError(f"{name} is not in memory; load the model without offloading")


def _role(path: str) -> str | None:
    return next((role for pattern, role in _RULES if re.fullmatch(pattern, path)), None)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_map(module: nn.Module) -> bool:
    """A matrix, or a module that took a matrix's place and is no site itself."""
    return _is_matrix(module) or hasattr(module, "in_features")


def _is_packed(module: nn.Module) -> bool:
    """Whether a module's own tensors are integers, as those of quantised layers are."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool for t in own)


def _is_stack(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.dim() == 3


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that hold attention; the language model's where there are several."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_has_attention, module))
    ]
    # A list inside another one's block (heads, groups) is a part of a block.
    outer = [f for f in found if not any(f[0].startswith(o[0] + ".") for o in found)]
    if len(outer) > 1:
        language = re.compile(r"(?:^|\.)(?:language_model|text_model)\.")
        outer = [f for f in outer if language.search(f[0] + ".")] or outer
    if len(outer) == 1:
        return outer[0]
    if outer:
        lists = ", ".join(name for name, _ in outer)
        raise UnsupportedModel(
            f"{type(model).__name__} has several lists of blocks ({lists}); "
            "give the part of the model to work on"
        )
    raise UnsupportedModel(
        f"{type(model).__name__} has no list of blocks with attention known by name; "
        f"it holds {_summary(model)}"
    )


def _has_attention(block: nn.Module) -> bool:
    return next(_queries(block), None) is not None


def _queries(block: nn.Module) -> Iterator[str]:
    """Paths in a block of what projects to queries."""
    for name, module in block.named_modules():
        if _is_map(module) and _role(name) in ("attention.q", "attention.qkv"):
            yield name


def _summary(model: nn.Module) -> str:
    """The kinds of paths that hold matrices, with running numbers folded."""
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kind = re.sub(r"\.\d+(?=\.)", ".N", "." + name.removesuffix(".weight"))[1:]
            kinds[kind] = kinds.get(kind, 0) + 1
    shown = [f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items()]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return ", ".join(shown[:12]) + more if shown else "no matrices"


def _block_sites(index: int, path: str, block: nn.Module) -> list[Site]:
    sites: list[tuple[str, Site]] = []
    strange: list[str] = []
    for name, module in block.named_modules():
        full = f"{path}.{name}"
        if _is_stack(module):
            sites += _stack(index, full, module)
            continue
        role = _role(name)
        weight = getattr(module, "weight", None)
        # Routers of transformers 5 are no Linear but hold a matrix like one.
        router = role == "experts.router" and isinstance(weight, Tensor) and weight.dim() == 2
        if role is not None and weight is None and _is_packed(module):
            raise GossamerError(
                f"{full} is a {type(module).__name__} that holds whole numbers for a weight, so it "
                "cannot be pruned or measured; load the model in bfloat16 or float32"
            )
        if not isinstance(weight, Tensor) or not (router or _is_matrix(module)):
            continue
        if role is None:
            # A single output is a gate (shared experts), not a matrix worth removing from.
            strange += [full] if min(weight.shape) > 1 else []
            continue
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise GossamerError(
                f"{full} is stored as {weight.dtype}, so it cannot be pruned or measured; "
                "load the model in bfloat16 or float32"
            )
        turned = isinstance(module, Conv1D)
        shape = (weight.shape[1], weight.shape[0]) if turned else (weight.shape[0], weight.shape[1])
        site = Site(full, role, index, full, "weight", shape, transposed=turned)
        sites.append((_group(name, role), site))
    if strange:
        raise UnsupportedModel(f"unknown role of {', '.join(strange[:12])} in {path}")
    return _couple(sites)


def _stack(index: int, path: str, module: nn.Module) -> Iterator[tuple[str, Site]]:
    """One site per expert and matrix of experts stacked as (E, out, in) or (E, in, out)."""
    turned = bool(getattr(module, "is_transposed", False))
    for parameter, role in _EXPERTS.items():
        stack = getattr(module, parameter, None)
        if not isinstance(stack, Tensor):
            continue
        count, first, second = stack.shape
        shape = (second, first) if turned else (first, second)
        for e in range(count):
            name = f"{path}.{parameter}[{e}]"
            yield f"{path}[{e}]", Site(name, role, index, path, parameter, shape, turned, e)


def _group(name: str, role: str) -> str:
    """Matrices of one group share heads or inner neurons: an attention, an MLP, an expert."""
    if role.startswith("attention."):
        return "cross" if "cross" in name else "attention"
    if role == "experts.router":
        return name
    parent = name.rpartition(".")[0]
    # BERT's MLP is spread over two siblings.
    return "mlp" if parent in ("intermediate", "output") else f"mlp {parent}"


def _couple(sites: list[tuple[str, Site]]) -> list[Site]:
    groups: dict[str, list[str]] = {}
    for group, site in sites:
        groups.setdefault(group, []).append(site.name)
    coupled = [
        replace(site, coupled=tuple(name for name in groups[group] if name != site.name))
        for group, site in sites
    ]
    return sorted(coupled, key=lambda site: ROLES.index(site.role))


def _attention(path: str, block: nn.Module) -> str:
    """Path of the module that projects to queries: it is the one that calls attention."""
    return f"{path}.{next(_queries(block))}".rpartition(".")[0]


def _base(model: nn.Module, stem: str) -> str:
    """The innermost module around the blocks whose forward takes the model's inputs."""
    path = stem
    while path:
        path = path.rpartition(".")[0]
        names = inspect.signature(model.get_submodule(path).forward).parameters
        if "input_ids" in names or "pixel_values" in names:
            return path
    return ""


def _head(model: nn.Module) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)
