"""The sandbox of chat templates: nothing gets out, nothing runs away, and data are never code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keeptune.errors import RecipeError
from keeptune.text.chat import ChatWording, UnboundedTemplateError
from keeptune.text.template import make_template
from keeptune.text.tokenizer import Tokenizer
from tests import tiny

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
# Refused at once, for the memory that they ask for or as faults of their own.
BOMBS = [
    "{% for a in range(10000000) %}x{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ [1] * 100000 * 100000 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ 'x'.zfill(10000000000) }}",
    "{{ [[1]] | tojson(indent=10000000000) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 1 / 0 }}",
    "{{ messages[7]['content'] + 'x' }}",
    "{{ unknown.attribute }}",
]
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
# Refused after the seconds that they may take.
SLOW_BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=99999) %}{% for a in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
    "{{ ('x\n' * 100000) | indent(100000) }}",
    "{{ ('<' * 300000 ~ '&' * 300000) | striptags | replace('&', '<' * 9999) | striptags }}",
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


@pytest.mark.slow
@pytest.mark.parametrize("source", SLOW_BOMBS)
def test_no_template_runs_on(source: str) -> None:
    with pytest.raises(RecipeError, match=r"chat template: found a template that takes more than (2 seconds|512 MB)"):
        render(source)


def test_a_template_that_was_stopped_or_failed_renders_the_next_conversation() -> None:
    wording = ChatWording(TWICE + "{{ f(messages[0]['content'] | int) }}{{ 1 / messages|length }}", role_tokens={})

    def rendered(*contents: str) -> str:
        messages = [{"role": "user", "content": content} for content in contents]
        return wording.render(messages, add_generation_prompt=False)

    assert rendered("1") == "1.0"
    with pytest.raises(
        RecipeError, match=r"found a template that takes more than 2 seconds for a conversation of the roles user; exp"
    ):
        rendered("60")
    assert rendered("2", "0") == "0.5"
    with pytest.raises(RecipeError, match=r"found UndefinedError \(list object has no element 0\)"):
        rendered()
    assert rendered("3") == "1.0"


def test_a_template_that_runs_on_is_tried_once(tmp_path: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    source = f"{{% if messages|length > 1 %}}{loop}{{% endif %}}{{{{ messages[0]['content'] }}}}"
    tokenizer = Tokenizer.load(tiny.chatml_tokenizer(tmp_path, chat_template=source))
    before = sum(os.times()[2:4])
    with pytest.raises(UnboundedTemplateError, match="found a template that takes more than 2 seconds"):
        make_template("chat", tokenizer=tokenizer, encoder_decoder=False)
    # Seconds of the processes that rendered it.
    assert sum(os.times()[2:4]) - before < 4.0


PROCESSES = """
import os, signal, sys, threading
from keeptune.text.chat import ChatWording
# A shell starts what runs in its background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
wording = ChatWording("{% if messages %}" + loop + "{% endif %}{{ add_generation_prompt }}", role_tokens={})
first = wording.render([], add_generation_prompt=True)
if os.fork() == 0:
    os._exit(wording.render([], add_generation_prompt=False) != "False")
_, status = os.wait()
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    wording.render([{"role": "user"}], add_generation_prompt=True)
except KeyboardInterrupt:
    print(first, status, wording.render([], add_generation_prompt=False), "torch" in sys.modules)
    print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found in Linux's /proc")
def test_forks_and_interruptions_leave_the_rendering_right_and_no_process_stays() -> None:
    command = [sys.executable, "-c", PROCESSES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(2)]
        process.kill()
    assert said[0] == "True 0 False False\n"
    workers = said[1].split()
    assert len(workers) == 1
    deadline = time.monotonic() + 10
    while is_alive(workers[0]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(workers[0])


def is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_text_passes_as_it_is() -> None:
    wording = ChatWording("{{ messages[0]['content'] }}", role_tokens={})
    text = "\ud800\x00\n\r\n\u2028🙂\\n{{ }}" + "é" * 100_000
    assert wording.render([{"role": "user", "content": text}], add_generation_prompt=False) == text


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
