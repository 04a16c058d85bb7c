"""LoRA's layers with fewer passes over memory, which can leave their adapters out.

peft computes base(x) + up(down(x)) * scaling. For each number of the result, in bf16, that moves 12 bytes beside the
products. Here the second product is added to the base's result while it is made, which moves 4, and rounds once.

Where adapters are left out, their modules are still called, but compute nothing: ZeRO-3 must see the same modules in
the same order in every pass, or it stops prefetching.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch


def replace_adapters(model: torch.nn.Module) -> None:
    """Replaces the forward of the model's LoRA layers, each with one adapter of add_lora's."""
    for layer in list(_layers(model)):
        _replace(layer)


@contextlib.contextmanager
def left_out(model: torch.nn.Module) -> Iterator[None]:
    """The model computes what its base computes."""
    layers = list(_layers(model))
    try:
        for layer in layers:
            layer.left_out = True
        yield
    finally:
        for layer in layers:
            layer.left_out = False


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if getattr(module, "lora_A", None))


def _replace(layer: Any) -> None:
    (name,) = layer.lora_A
    down_layer, up_layer, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain_down, plain_up = down_layer.forward, up_layer.forward
    layer.left_out = False

    def forward(self, x):
        return up_layer(down_layer(dropout(x)), self.base_layer(x))

    def forward_down(self, x):
        return x.new_empty(0) if layer.left_out else plain_down(x)

    def forward_up(self, low, result=None):
        """result: the base's, to which the product is added."""
        if result is None:
            return plain_up(low)
        if layer.left_out:
            return result
        flat = result.reshape(-1, result.shape[-1])
        low = low.reshape(-1, low.shape[-1])
        return torch.addmm(flat, low, self.weight.t(), alpha=layer.scaling[name]).view_as(result)

    layer.forward = types.MethodType(forward, layer)
    down_layer.forward = types.MethodType(forward_down, down_layer)
    up_layer.forward = types.MethodType(forward_up, up_layer)
