"""Read a model's layout from its modules. Only names, classes and shapes are read, so the meta device will do.

T positions, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ragmoe._errors import ModelError
from ragmoe.experts import Experts
from ragmoe.gates import Gate
from ragmoe.models.plan.layout import Attention, Layer, Layout, Routed
from ragmoe.models.plan.neighbours import SeesNeighbours, neighbour_flops

# Inside a layer: the kind of the first word of a parameter's path that holds one of these. A gate may hold attention of
# its own, and attention a gate: the outer one counts.
_OUTER = (("attention", "attn"), ("attention", "attention"), ("gate", "router"))
# Else the first kind one of whose words is in the path.
_INNER = (
    ("shared expert", {"shared_expert", "shared_experts", "shared_mlp"}),
    ("gate", {"gate", "shared_expert_gate"}),
    ("experts", {"experts"}),
    ("dense FFN", {"mlp", "ffn", "feed_forward", "intermediate", "output", "fc1", "fc2", "block_sparse_moe"}),
)
# Outside the layers: what is applied once a sequence and not once a token.
_ONCE = {"pooler", "classifier", "score", "special_outputs", "seq_relationship"}
_ATTENDS = {"full_attention", "sliding_attention", "chunked_attention"}


def read_layout(model: nn.Module, *, run_gates: bool = True) -> Layout:
    """Read a model, wherever its weights are.

    Args:
        run_gates: False leaves out the FLOPs of gates that see neighbours, for which one of them has to be run.

    Raises:
        ModelError: its layers or experts cannot be told from its modules, or K is not between 1 and E.
    """
    config: Any = model.config
    stack = _stack(model, config)
    layers = {f"{stack}.{i}": Layer() for i in range(config.num_hidden_layers)}
    outside, outputs, per_sequence = Layer(), 0, 0
    seen: set[int] = set()
    traced = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, SeesNeighbours))
    for found in _parameters(model, stack):
        layer = layers.get(found.layer, outside)
        _add(layer, found, shared=id(found.tensor) in seen)
        seen.add(id(found.tensor))
        if not found.is_matrix or f"{found.path}.".startswith(traced):
            continue
        if not found.layer and _ONCE & set(found.path.split(".")):
            per_sequence += 2 * found.tensor.numel()
            continue
        layer.flops[found.kind] += 2 * found.tensor.numel()
        # Adapters add to a matrix; they are no networks of their own.
        if "lora_" not in found.path:
            layer.matrices.setdefault(found.kind, []).append(found.tensor.numel())
        if found.kind == "head":
            outputs += found.tensor.shape[0]
    read = tuple(_complete(model.get_submodule(path), layer, config, run_gates) for path, layer in layers.items())
    layout = Layout(config.hidden_size, read, outside, outputs, per_sequence)
    return replace(layout, notes=tuple(_notes(layout, config)))


class _Found(NamedTuple):
    """A parameter where it is used; one that is shared is found wherever it is."""

    path: str
    module: nn.Module
    name: str
    tensor: Tensor
    layer: str

    @property
    def kind(self) -> str:
        words = self.path.split(".")
        if isinstance(self.module, nn.Embedding):
            return "embedding"
        if "norm" in type(self.module).__name__.lower():
            return "norm"
        if not self.layer:
            between = any("embed" in word or word.isdecimal() for word in words)
            return "other" if between else "head"
        if "moe.gate" in self.path or "mlp.gate.inner" in self.path or "summary" in words:
            return "gate"
        outer = next((kind for word in words for kind, name in _OUTER if name in word), None)
        return outer or next((kind for kind, names in _INNER if names & set(words)), "other")

    @property
    def is_matrix(self) -> bool:
        """Whether a token's state is multiplied by it. Biases of fused experts have two dimensions as well."""
        bias = any(word.endswith("bias") for word in (self.name, *self.path.split(".")))
        return self.tensor.dim() > 1 and not bias and self.kind not in ("embedding", "norm")


def _stack(model: nn.Module, config: Any) -> str:
    """The path of the one list that has as many modules as there are layers."""
    lists = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(word.isdecimal() for word in name.split("."))
    }
    found = [name for name, length in lists.items() if length == config.num_hidden_layers]
    if len(found) != 1:
        shown = ", ".join(f"{name} of {length}" for name, length in lists.items()) or "none"
        raise ModelError(
            f"{config.model_type!r} cannot be planned: expected one list of its {config.num_hidden_layers} layers, "
            f"each applied once; there are lists: {shown}"
        )
    return found[0]


def _parameters(model: nn.Module, stack: str) -> Iterator[_Found]:
    for path, module in model.named_modules():
        layer = ""
        if path.startswith(f"{stack}."):
            layer = f"{stack}.{path.removeprefix(f'{stack}.').partition('.')[0]}"
        for name, tensor in module.named_parameters(recurse=False):
            yield _Found(path, module, name, tensor, layer)


def _add(layer: Layer, found: _Found, *, shared: bool) -> None:
    """Count a parameter in its layer, unless it has been counted elsewhere."""
    if not shared:
        layer.parameters[found.kind] += found.tensor.numel()
    if found.kind == "norm" and found.name == "weight":
        layer.norms.append((found.tensor.numel(), isinstance(found.module, nn.LayerNorm)))


def _complete(inside: nn.Module, layer: Layer, config: Any, run_gates: bool) -> Layer:
    """The layer with what its modules say beyond their parameters."""
    modules = {name: module for name, module in inside.named_modules() if name}
    _check_known(modules, config)
    routed = _routed(modules, layer, config)
    if routed is not None:
        # So far all E were counted.
        layer.flops["experts"] = layer.flops["experts"] * routed.top_k // routed.experts
        layer.matrices["experts"] = [size // routed.experts for size in layer.matrices["experts"]]
    once = 0
    for module in modules.values():
        if run_gates and isinstance(module, SeesNeighbours):
            token, question = neighbour_flops(module, config)
            layer.flops["gate"] += token
            once += question
    return replace(layer, attention=tuple(_attentions(modules, config)), routed=routed, once=once)


def _check_known(modules: dict[str, nn.Module], config: Any) -> None:
    """ModelError where something looks like fused experts and is not called so: all of it would pass for active."""
    E = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    for name, module in modules.items():
        if "experts" in name.split("."):
            continue
        for parameter, x in module.named_parameters(recurse=False):
            if E and E > 1 and x.dim() == 3 and len(x) == E:
                raise ModelError(f"cannot tell the experts of {config.model_type!r} by name: {name}.{parameter}")


def _routed(modules: dict[str, nn.Module], layer: Layer, config: Any) -> Routed | None:
    if not layer.parameters["experts"]:
        return None
    name = next(name for name in modules if name.rpartition(".")[2] == "experts")
    experts, block = modules[name], name.rpartition(".")[0]
    beside = [module for other, module in modules.items() if other.rpartition(".")[0] == block]
    # A decoder's gate stands inside its family's.
    within = f"{block}." if block else ""
    gates = (module for other, module in modules.items() if isinstance(module, Gate) and other.startswith(within))
    gate = next((module.settings for module in gates), None)
    E, K = (gate.experts, gate.top_k) if gate else (_count(experts, config), _top_k(beside, config))
    if not 1 <= K <= E:
        raise ModelError(f"a token takes {K} experts, but a layer has {E}: expected 1 to {E}")
    inside_dense = isinstance(experts, Experts) and experts.needs_dense
    return Routed(E, K, layer.parameters["experts"], inside_dense)


def _count(experts: nn.Module, config: Any) -> int:
    """E: the first dimension of fused parameters, or the number of modules in a list."""
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    fused = [x.shape[0] for x in experts.parameters() if x.dim() == 3]
    if not fused:
        raise ModelError(f"cannot tell the experts of {config.model_type!r} apart: {type(experts).__name__}")
    return fused[0]


def _top_k(beside: Sequence[nn.Module], config: Any) -> int:
    """K, which the gate knows, or else the configuration."""
    known = [getattr(module, name, None) for module in beside for name in ("top_k", "num_experts_per_tok")]
    known.append(getattr(config, "num_experts_per_tok", None))
    found = next((k for k in known if isinstance(k, int)), None)
    if found is None:
        raise ModelError(
            f"cannot tell how many experts of {config.model_type!r} a token takes: set num_experts_per_tok"
        )
    return found


def _attentions(modules: dict[str, nn.Module], config: Any) -> Iterator[Attention]:
    """The innermost modules that are called attention, those that look at neighbours apart."""
    named = {name: module for name, module in modules.items() if "Attention" in type(module).__name__}
    seeing = tuple(f"{name}." for name, module in modules.items() if isinstance(module, SeesNeighbours))
    for name, module in named.items():
        if any(other.startswith(f"{name}.") for other in named) or name.startswith(seeing):
            continue
        heads = _first(module, "num_heads", "num_attention_heads") or config.num_attention_heads
        width = _first(module, "attention_head_size", "head_dim") or config.hidden_size // heads
        kv_heads = heads // (_first(module, "num_key_value_groups") or 1)
        window = module.sliding_window if hasattr(module, "sliding_window") else getattr(config, "sliding_window", None)
        yield Attention(
            heads,
            kv_heads,
            key_width=_first(module, "qk_head_dim") or width,
            value_width=_first(module, "v_head_dim") or width,
            window=window if isinstance(window, int) and window > 0 else None,
        )


def _first(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is a number."""
    return next((x for name in names if isinstance(x := getattr(module, name, None), int)), None)


def _notes(layout: Layout, config: Any) -> Iterator[str]:
    """What is not in the figures."""
    kinds = set(getattr(config, "layer_types", None) or ())
    silent = sum(not layer.attention for layer in layout.layers)
    if silent or kinds - _ATTENDS:
        what = ", ".join(sorted(map(str, kinds - _ATTENDS))) or f"{silent} layers without attention"
        yield f"Not in the FLOPs and activations: what {what} do from position to position, beyond their matrices."
    if getattr(config, "index_topk", None):
        yield "Sparse attention is counted as if it were over all positions."
    if unknown := layout.parameters.get("other", 0):
        yield f"{unknown:,} parameters are of no kind known here, and taken to be used for every token."
