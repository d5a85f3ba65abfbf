"""A recipe's methods with their defaults."""

from __future__ import annotations

import pytest

from keeptune.config import LEARNING_RATES, MethodFields
from keeptune.stages.methods import learning_rate


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (MethodFields(), 2e-5),
        (MethodFields(peft_type="LORA"), 2e-4),
        (MethodFields(peft_type="ia3"), LEARNING_RATES["IA3"]),
        (MethodFields(peft_type="C3A"), 2e-4),
        (MethodFields(peft_type="IA3", learning_rate=0.5), 0.5),
    ],
)
def test_a_method_has_the_learning_rate_of_its_kind(fields: MethodFields, expected: float) -> None:
    assert learning_rate(fields) == expected
