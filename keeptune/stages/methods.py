"""The recipe's methods: a recipe arrives; each method leaves with its defaults, held against the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keeptune.config import ADAPTER_LEARNING_RATE, LEARNING_RATES, MethodFields, Recipe
from keeptune.config_data import LEAST_LENGTH
from keeptune.errors import RecipeError, raise_collected
from keeptune.stages.computing import policy_of
from keeptune.stages.data import check_sources

if TYPE_CHECKING:
    from keeptune.model.methods import Method


def check_methods(recipe: Recipe, *, prepared: bool = False) -> None:
    """Refuse methods that do not fit the model and a device that is not there, before any data are prepared.

    Each method is applied to the model on the meta device, so that none is refused after another was trained. The data
    files are looked for too, unless the data are `prepared`: a trial is told the names of its tasks and no paths.

    Raises:
        RecipeError: what is wrong with any of the methods.
    """
    from keeptune.model.folder import check_model_folder, resolve_model
    from keeptune.stages.budgets import budgets_of

    budgets_of(recipe)
    # What can be known without torch is told first: its import takes seconds.
    if not prepared:
        check_sources(recipe)
    folder = resolve_model(recipe.model)
    facts = check_model_folder(folder)

    from keeptune.model.load import check_size, empty_model, require_quantization
    from keeptune.model.methods import check_fit, check_method
    from keeptune.model.modes import NOT_RECOMPUTED

    policy_of(recipe)
    check_size(folder, num_weights=facts.num_weights)
    quantised = recipe.quantization or facts.quantised
    if quantised:
        require_quantization()
    problems = []
    if recipe.quantization is not None and facts.quantised:
        problems.append(
            f"quantization: found {recipe.quantization} and a model that is stored quantised; expected one of them. "
            "Remove quantization, or name the unquantised model."
        )
    for name in recipe.methods:
        method = method_of(recipe, name)
        problems += _room_problems(method, facts.max_positions)
        if method.peft_type in NOT_RECOMPUTED and recipe.training.gradient_checkpointing:
            problems.append(
                f"training.gradient_checkpointing: found true with methods.{name}, a {method.peft_type}, whose keys "
                "and values recomputed layers do not read; expected false. Set training.gradient_checkpointing=false, "
                "or give the method a recipe of its own."
            )
        try:
            check_method(method, encoder_decoder=facts.encoder_decoder, quantised=quantised)
            if method.peft_type is not None or method.frozen_layers:
                check_fit(empty_model(folder), method)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise_collected(RecipeError, problems)


def _room_problems(method: Method, max_positions: int | None) -> list[str]:
    """Return that virtual tokens leave a record too little of the model's positions, where they do."""
    number = method.arguments.get("num_virtual_tokens")
    if max_positions is None or not isinstance(number, int) or number <= max_positions - LEAST_LENGTH:
        return []
    where = f"methods.{method.name}.num_virtual_tokens"
    return [
        f"{where}: found {number}; expected at most {max_positions - LEAST_LENGTH}, as the model has {max_positions} "
        f"positions and a record needs some of them. Lower it, to {where}=20 for instance."
    ]


def method_of(recipe: Recipe, name: str) -> Method:
    """Return a method of the recipe with its default learning rate filled in."""
    from keeptune.model.methods import Method

    own = recipe.methods[name]
    return Method(
        name,
        own.peft_type,
        learning_rate(own),
        dict(own.model_extra or {}),
        frozen_layers=own.frozen_layers,
        l2_base=own.l2_base,
        replay_fraction=own.replay_fraction,
        replay_kl=own.replay_kl,
    )


def learning_rate(fields: MethodFields) -> float:
    """Return a method's learning rate, the recipe's or the default of its kind."""
    return fields.learning_rate or LEARNING_RATES.get(fields.peft_type, ADAPTER_LEARNING_RATE)
