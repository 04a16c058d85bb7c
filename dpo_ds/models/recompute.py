"""Recomputation: which layers keep their activations for the backward pass, and which compute them again there."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_ds.models.lora import LanguageModel


def switched_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be switched one by one, from the model's input to its output; none in some models' own
    code."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: LanguageModel, layers: int) -> None:
    """Makes the first `layers` layers compute their activations again in the backward pass; where layers cannot be
    switched one by one, all of them unless it is 0.

    The first ones, because the backward pass reaches them last: the activations that the others keep are free by then.
    """
    if not layers:
        if model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in switched_layers(model)[layers:]:
        layer.gradient_checkpointing = False
