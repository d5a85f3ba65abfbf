"""The sandbox of chat templates: nothing gets out, nothing runs away, and data are never code."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeptune.errors import RecipeError
from keeptune.text.chat import ChatWording

MESSAGES = [{"role": "user", "content": "hi"}]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ ('%s' | attr('format')).__globals__ }}",
    "{{ messages | attr('__class__') | attr('__mro__') }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% set x = messages.clear() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ strftime_now.__self__.__class__.__subclasses__() }}",
]
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(10000000) %}x{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ 'x' * 100000000 }}",
    "{{ [1] * 100000 * 100000 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 100000000 | string }}",
    "{{ '%1000000000d' % 1 }}",
    "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = (ns.s ~ 1) ~ (ns.s ~ ns.s) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
    "{{ messages[7]['content'] + 'x' }}",
    "{{ unknown.attribute }}",
]


def render(source: str, **role_tokens: str) -> str:
    return ChatWording(source, role_tokens=role_tokens).render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize("source", ESCAPES)
def test_no_template_escapes_the_sandbox(source: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    try:
        text = render(source.replace("CANARY", str(canary)))
    except RecipeError as error:
        assert str(error).startswith("chat template: found ")
    else:
        assert text.strip() == "" or "class" not in text
    assert not canary.exists()


@pytest.mark.parametrize("source", BOMBS)
def test_no_template_runs_away(source: str) -> None:
    with pytest.raises(RecipeError, match=r"chat template: found .*expected"):
        render(source)


def test_messages_are_data_whatever_they_spell() -> None:
    wording = ChatWording("{{ messages[0]['content'] }}", role_tokens={})
    hostile = "{{ 7 * 7 }}{% for a in range(9) %}{# <b>"
    assert wording.render([{"role": "user", "content": hostile}], add_generation_prompt=False) == hostile


def test_the_template_gets_copies_of_the_messages() -> None:
    messages = [{"role": "user", "content": "hi"}]
    ChatWording("{{ messages[0]['content'] }}", role_tokens={}).render(messages, add_generation_prompt=False)
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ pad_token }}|", "<s>|"),
        ("{% if tools %}tools{% endif %}{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{{ {'b': 'é', 'a': 1} | tojson(indent=None, sort_keys=true) }}", '{"a": 1, "b": "é"}'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for m in messages %}{{ loop.first and loop.last and loop.length }}{% endfor %}", "1"),
        ("{% for m in messages %}\n  {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}", "hi"),
        ("a {%- generation -%} b {%- endgeneration %} c", "ab c"),
        ("{{ 'a' ~ 1 ~ ('b' ~ 2) }}{{ 2 ** 3 }}{{ '%02d' % 7 }}{{ [1] + [2] }}", "a1b2807[1, 2]"),
        ("   {% if true %}\nx\n   {% endif %}\n", "x\n"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ],
)
def test_templates_render_as_in_transformers(source: str, expected: str) -> None:
    assert render(source, bos_token="<s>") == expected


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"chat template: found .*expected a Jinja template that compiles"):
        render("{% for %}")


def test_a_refusal_of_the_template_reaches_the_user() -> None:
    with pytest.raises(RecipeError, match=r"\(no system here\) for a conversation of the roles user; expected"):
        render("{{ raise_exception('no system here') }}")
