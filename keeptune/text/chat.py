"""Messages arrive, rendered text leaves: chat templates are untrusted code, so they run in a sandbox with caps.

The sandbox is that of transformers (same filters, same globals, same whitespace rules), but nothing in it depends on
the clock, and loops, repetition and output are bounded.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from keeptune.errors import RecipeError

_MAX_CHARACTERS = 4 * 1024 * 1024
_MAX_LOOP_ITEMS = 1_000_000
_MAX_NUMBER = 1_000_000
# The date that Llama's own template falls back to; one record must render alike on every day.
_FIXED_DATE = datetime.datetime(2024, 7, 26)
_GENERATION_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_FAULTS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)


class ChatWording:
    """A compiled chat template with the tokens that it may name."""

    literals: Set[str]
    """The texts that stand in the template, as text or as string constants."""

    def __init__(self, source: str, *, role_tokens: Mapping[str, str]) -> None:
        self._role_tokens = dict(role_tokens)
        self._num_loop_items = 0
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters |= {"tojson": _to_json, "_counted": self._counted, "_joined": _joined}
        environment.globals |= {"raise_exception": _raise, "strftime_now": _FIXED_DATE.strftime}
        environment.intercepted_binops = frozenset({"+", "*", "**", "%"})  # pyright: ignore
        environment.binop_table |= {operator: _bounded(operator) for operator in environment.intercepted_binops}
        try:
            tree = environment.parse(_GENERATION_TAG.sub(_as_condition, source))
            self._variables = frozenset(node.name for node in tree.find_all(jinja2.nodes.Name))
            strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
            self._keys = strings | {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
            self.literals = strings | {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
            self._template = environment.from_string(_guarded(tree))
        except _FAULTS as error:
            raise RecipeError(
                f"chat template: found {error}; expected a Jinja template that compiles. "
                "Set data.template=alpaca, or choose another model."
            ) from error

    def reads(self, key: str) -> bool:
        """Return whether the template names the attribute or key `key` of anything."""
        return key in self._keys

    def has_variable(self, name: str) -> bool:
        """Return whether the template uses the variable `name`."""
        return name in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
        switches: Mapping[str, bool] | None = None,
    ) -> str:
        """Return the text of a conversation, or what an answer to it starts from.

        `switches` are further variables of the template, such as `enable_thinking`.

        Raises:
            RecipeError: the template refuses the conversation, breaks the sandbox or passes its caps.
        """
        self._num_loop_items = 0
        variables: dict[str, Any] = {**self._role_tokens, **(switches or {})}
        variables |= {"messages": copy.deepcopy(list(messages)), "tools": copy.deepcopy(tools), "documents": None}
        try:
            pieces, num_characters = [], 0
            for piece in self._template.generate(**variables, add_generation_prompt=add_generation_prompt):
                num_characters += len(piece)
                if num_characters > _MAX_CHARACTERS:
                    _raise(f"more than {_MAX_CHARACTERS} characters of output")
                pieces.append(piece)
        except _FAULTS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RecipeError(
                f"chat template: found {type(error).__name__} ({error}) for a conversation of the roles {roles}; "
                "expected rendered text. Change the records, or set data.template=alpaca."
            ) from error
        return "".join(pieces)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._num_loop_items += 1
            if self._num_loop_items > _MAX_LOOP_ITEMS:
                _raise(f"more than {_MAX_LOOP_ITEMS} turns of its loops")
            yield item


def _guarded(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Return the tree with every loop counted, every `~` bounded and no huge number in it."""
    for number in tree.find_all(jinja2.nodes.Const):
        if isinstance(number.value, int) and number.value > _MAX_NUMBER:
            _raise(f"the number {number.value}, above {_MAX_NUMBER},")
    for loop in tree.find_all(jinja2.nodes.For):
        loop.iter = _filtered(loop.iter, name="_counted")
    # Children first, so that a `~` inside a `~` is replaced in the list that its parent keeps.
    for parent in reversed([tree, *tree.find_all(jinja2.nodes.Node)]):
        for field, value in list(parent.iter_fields()):
            if isinstance(value, jinja2.nodes.Concat):
                setattr(parent, field, _join(value))
            elif isinstance(value, list):
                setattr(parent, field, [_join(v) if isinstance(v, jinja2.nodes.Concat) else v for v in value])
    return tree.set_environment(tree.environment)  # pyright: ignore


def _join(concat: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
    return _filtered(jinja2.nodes.List(concat.nodes, lineno=concat.lineno), name="_joined")


def _filtered(node: Any, *, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _joined(values: Sequence[object]) -> str:
    texts = [str(value) for value in values]
    if sum(map(len, texts)) > _MAX_CHARACTERS:
        _raise(f"a text of more than {_MAX_CHARACTERS} characters")
    return "".join(texts)


def _bounded(operator: str) -> Callable[[Any, Any], Any]:
    """Return the operator of the sandbox, refusing results that only a hostile template needs."""
    plain = ImmutableSandboxedEnvironment.default_binop_table[operator]

    def apply(left: Any, right: Any) -> Any:
        numbers = [abs(value) for value in (left, right) if isinstance(value, int | float)]
        sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        if operator == "+" and sum(sizes) > _MAX_CHARACTERS:
            _raise(f"a text of more than {_MAX_CHARACTERS} characters")
        if operator == "*" and sizes and numbers and sizes[0] * numbers[0] > _MAX_CHARACTERS:
            _raise(f"a text of more than {_MAX_CHARACTERS} characters")
        if operator == "**" and max(numbers, default=0) > 64:
            _raise("a power above 64")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            _raise("a width above 9999")
        return plain(left, right)

    return apply


def _as_condition(tag: re.Match[str]) -> str:
    # transformers' own tag marks the answer and prints its body unchanged; so does a condition that always holds.
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
