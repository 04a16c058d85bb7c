"""Norms, rotations and gated activations, each as one kernel that torch compiles.

Eagerly, each of these small functions is several kernels that read and write whole activations. Compiled are
transformers' own functions, so the formulas stay theirs; the modules around them are called as before, so ZeRO-3 sees
the same ones. Whole layers are not compiled: each new packing would compile them again.

A model's classes decide what is compiled: NORMS, GATES, ROTATED and the others name those of the twelve models'
architectures.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from dpo_ds.ranks import console

NORMS = frozenset(
    {"LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm", "Phi3RMSNorm", "GemmaRMSNorm"}
    | {"CohereLayerNorm"}
)
GATES = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "GemmaMLP", "CohereMLP", "StableLmMLP"})
GATES_IN_ONE = frozenset({"Phi3MLP"})  # whose gate and up projection are one product
EXPERTS = frozenset({"MixtralExperts"})
ROTATED = frozenset(
    {"LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Phi3Attention", "GemmaAttention"}
    | {"CohereAttention", "StableLmAttention"}
)
ACTIVATIONS = frozenset({"NewGELUActivation"})  # GPT-2's, of eight kernels
ROTATION = "apply_rotary_pos_emb"  # what each architecture's file calls it


def fuse(model: torch.nn.Module) -> None:
    """Compiles the small functions of a model's layers, as they are called for the first time."""
    for module, change in parts(model):
        change(module)


def parts(model: torch.nn.Module) -> list[tuple[torch.nn.Module, Callable[[Any], None]]]:
    """The modules that `fuse` changes, each with how. Empty: no rule knows the architecture."""
    return [
        (module, change)
        for module in model.modules()
        for names, change in RULES.items()
        if type(module).__name__ in names and type(module).__module__.startswith("transformers.")
    ]


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)  # for any number of tokens


def _of_its_own(function: Any) -> Callable:
    """The function with a code object of its own. torch counts how often it compiles one, and gives up after eight
    times; functions that are made by the same line would share theirs."""
    function.__code__ = function.__code__.replace()
    return function


def _norm(module: Any) -> None:
    constants = {name: value for name, value in vars(module).items() if isinstance(value, float)}  # its epsilon
    norm = _compiled(_norm_of(type(module), **constants))  # type: ignore[arg-type]  # a class is hashable

    def forward(self, x):
        return norm(self.weight, x)

    module.forward = types.MethodType(forward, module)


@functools.cache
def _norm_of(kind: type, **constants: float) -> Callable:
    """A class of norms as a function of the weight and the input: a compiled function that read a module's weight would
    be compiled again for each module."""
    methods = {name: method for name, method in vars(kind).items() if isinstance(method, types.FunctionType)}
    Norm: Any = type(kind.__name__, (), {**methods, **constants, "__init__": object.__init__})

    def norm(weight, x):
        held = Norm()
        held.weight = weight
        return held.forward(x)

    return _of_its_own(norm)


def _gate(module: Any) -> None:
    gated = _gated(module.act_fn)

    def forward(self, x):
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

    module.forward = types.MethodType(forward, module)


def _gate_in_one(module: Any) -> None:
    gated = _gated(module.activation_fn)

    def forward(self, x):
        return self.down_proj(gated(*self.gate_up_proj(x).chunk(2, dim=-1)))

    module.forward = types.MethodType(forward, module)


def _experts(module: Any) -> None:
    gated = _gated(module.act_fn)
    module._apply_gate = lambda both: gated(*both.chunk(2, dim=-1))


_GATED: dict[type, Callable] = {}


def _gated(activation: torch.nn.Module) -> Callable:
    """activation(gate) * up: one function for each kind of activation, which has no state."""
    kind = type(activation)
    if kind not in _GATED:
        plain = copy.deepcopy(activation)  # ZeRO-3 will put hooks on the model's own, which would be compiled as well
        _GATED[kind] = _compiled(_of_its_own(lambda gate, up: plain(gate) * up))
    return _GATED[kind]


def _rotation(module: Any) -> None:
    """The layer's own forward, which finds the compiled rotation under the name of the plain one."""
    plain = type(module).forward
    if ROTATION not in plain.__code__.co_names:
        _say_left(type(module).__name__)
        return
    names = {**plain.__globals__, ROTATION: _compiled(plain.__globals__[ROTATION])}
    own = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    own.__kwdefaults__ = plain.__kwdefaults__
    module.forward = types.MethodType(own, module)


@functools.cache
def _say_left(name: str) -> None:
    console.say(f"the rotation in {name} is not compiled: another package has wrapped that layer's forward")


def _activation(module: Any) -> None:
    forward = _compiled(type(module).forward)
    module.forward = lambda x: forward(None, x)


RULES: dict[frozenset[str], Callable[[Any], None]] = {
    NORMS: _norm, GATES: _gate, GATES_IN_ONE: _gate_in_one, EXPERTS: _experts, ROTATED: _rotation,
    ACTIVATIONS: _activation,
}  # fmt: skip
