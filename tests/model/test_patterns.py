"""Patterns that name modules: those that people write pass, those that never end are refused in two seconds."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from torch import nn

from keeptune.errors import RecipeError
from keeptune.model.methods import Method, apply_method
from keeptune.model.patterns import refuse_endless_patterns
from tests.model.test_methods import llama

ENDLESS, BROKEN = "(.+)+Z", "*q["


@pytest.mark.parametrize(("key", "value"), [("target_modules", ENDLESS), ("rank_pattern", {"q_proj": 2, ENDLESS: 4})])
def test_a_pattern_that_never_ends_is_refused_in_two_seconds(key: str, value: Any) -> None:
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(RecipeError, match=rf"^methods\.mine\.{key}: found the pattern .*takes longer than a second"):
        refuse_endless_patterns({"r": 4, key: value}, llama(), prefix="methods.mine.")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", BROKEN),
        ("exclude_modules", BROKEN),
        ("feedforward_modules", BROKEN),
        ("layers_pattern", BROKEN),
        ("layers_pattern", ["layers", BROKEN]),
        ("rank_pattern", {"q_proj": 2, BROKEN: 4}),
        ("alpha_pattern", {BROKEN: 4}),
        ("n_frequency_pattern", {BROKEN: 4}),
        ("modules_to_save", ["lm_head", BROKEN]),
    ],
)
def test_every_argument_that_peft_matches_is_looked_at(key: str, value: Any) -> None:
    message = rf"^methods\.mine\.{key}: found the pattern '\*q\[', which is no regular expression \("
    with pytest.raises(RecipeError, match=message):
        refuse_endless_patterns({"r": 4, key: value}, llama(), prefix="methods.mine.")


def test_what_is_no_pattern_is_refused() -> None:
    for broken in ("q_proj(", "(?P<a>x)(?P<a>y)", "(" * 5_000 + ")" * 5_000):
        with pytest.raises(RecipeError, match=r"which is no regular expression|which takes longer"):
            refuse_endless_patterns({"target_modules": broken}, llama(), prefix="methods.mine.")
    with pytest.raises(RecipeError, match="found a pattern of 10,001 characters; expected at most 10,000"):
        refuse_endless_patterns({"target_modules": "(" * 10_001}, llama(), prefix="methods.mine.")


class Named(nn.Module):
    """As many names as a large mixture of experts has, each a common one."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        names = ("self_attn.q_proj", "mlp.experts.17.down_proj", "input_layernorm")
        return iter([(f"model.layers.{i}.{name}", self) for i in range(3_000) for name in names])


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"(?i).*Q_PROJ",
        r"model\.layers\.(1[0-9]|2[0-3])\.self_attn\.(q|k|v|o)_proj",
        # As Unsloth writes it.
        r"(?:.*?(?:vision|image|visual|patch).*?(?:self_attn|attention|mlp|feed_forward).*?(?:q_proj|k_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj|down_proj)))",
    ],
)
def test_patterns_that_people_write_pass_on_a_large_model(pattern: str) -> None:
    refuse_endless_patterns({"target_modules": pattern}, Named(), prefix="methods.mine.")


def test_names_cost_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)
    arguments = {
        "target_modules": "all-linear", "modules_to_save": ["lm_head"], "layers_pattern": None, "exclude_modules": "",
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 4}, "r": 8,
    }  # fmt: skip
    refuse_endless_patterns(arguments, llama(), prefix="methods.mine.")


def test_a_recipes_pattern_is_refused_before_peft_sees_it() -> None:
    method = Method("mine", "LORA", 1e-3, {"target_modules": ENDLESS})
    with pytest.raises(RecipeError, match=r"^methods\.mine\.target_modules: found the pattern"):
        apply_method(llama(), method, seed=0)
