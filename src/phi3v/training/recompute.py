"""Recomputation: which layers keep only their input and run again in the backward pass, to save memory."""

from __future__ import annotations

from typing import Any


def recompute_layers(model: Any, interval: int) -> None:
    """Recompute every `interval`-th layer of the vision tower and the decoder; 0: none.

    The towers' layers are counted one after the other (transformers, activation_checkpointing_enable). Recomputation is
    non-reentrant: it changes neither loss nor gradients.
    """
    if interval:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=interval)
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
