"""Recomputation: which layers keep only their input and run again in the backward pass, to save memory."""

from __future__ import annotations

from typing import Any

from phi3v.planning.choice import RECOMPUTE_SHARES


def interval_of(share: float) -> int:
    """n if every n-th layer is recomputed; 0 for none."""
    return round(1 / share) if share else 0


INTERVALS = tuple(map(interval_of, RECOMPUTE_SHARES))
"""What `auto` chooses from, fewest layers first: none (0), every eighth, fourth, third, second, and every layer (1)."""


def recomputation(interval: int) -> str:
    """In words, for logs."""
    if interval <= 1:
        return "all layers recomputed" if interval else "no layer recomputed"
    return f"1 of {interval} layers recomputed"


def recompute_layers(model: Any, interval: int) -> None:
    """Recompute every `interval`-th layer of the vision tower and the decoder; 0: none.

    The towers' layers are counted one after the other (transformers, activation_checkpointing_enable). Recomputation is
    non-reentrant: it changes neither loss nor gradients.
    """
    if interval:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=interval)
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
