"""A recipe arrives; the device and the number formats of its run leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keeptune.config import Recipe

if TYPE_CHECKING:
    from keeptune.model.device import Policy

_ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 11))


def policy_of(recipe: Recipe) -> Policy:
    """Return the device and the number formats of a recipe's run on this machine.

    Raises:
        RecipeError: the named device is not there.
    """
    from keeptune.model.device import choose, look
    from keeptune.model.path import moves_own_weights

    between = any(alpha < 1.0 for alpha in wanted_alphas(recipe))
    moved = any(moves_own_weights(m.peft_type, m.model_extra or {}) for m in recipe.methods.values())
    return choose(look(), device=recipe.device, bf16=recipe.training.bf16, between=between and moved)


def wanted_alphas(recipe: Recipe) -> tuple[float, ...]:
    """Return the points between base and trained model that the recipe asks for, the trained one perhaps among them."""
    retention = recipe.retention
    return (_ALPHAS if retention.budget else ()) if retention.alphas == "auto" else tuple(retention.alphas)
