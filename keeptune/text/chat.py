"""Chat templates: messages in, rendered text out. Templates are untrusted code, so another process renders them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes

from keeptune.errors import RecipeError

_WORKER = Path(__file__).with_name("chat_worker.py")
_GENERATION_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class ChatWording:
    """A chat template with the tokens that it may name.

    Its process starts with the first rendering, and ends with this object or with the process that made it.
    """

    literals: Set[str]
    """The texts that stand in the template, as text or as string constants."""

    def __init__(self, source: str, *, role_tokens: Mapping[str, str]) -> None:
        source = _GENERATION_TAG.sub(_as_condition, source)
        try:
            # This reads the template and runs nothing of it.
            environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
            tree = environment.parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise _no_template(str(error)) from error
        self._variables = frozenset(node.name for node in tree.find_all(jinja2.nodes.Name))
        strings = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        self._keys = strings | {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        self.literals = strings | {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        self._start = {"source": source, "role_tokens": dict(role_tokens)}
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

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
            RecipeError: the template does not compile, refuses the conversation, breaks the sandbox, or takes more than
                2 seconds or 512 MB.
        """
        variables = {**(switches or {}), "messages": [dict(message) for message in messages], "tools": tools}
        variables |= {"documents": None, "add_generation_prompt": add_generation_prompt}
        reply = self._asked(variables)
        if "text" in reply:
            return reply["text"]
        if not reply["compiled"]:
            raise _no_template(reply["fault"])
        roles = ", ".join(message["role"] for message in messages)
        raise RecipeError(
            f"chat template: found {reply['fault']} for a conversation of the roles {roles}; "
            "expected rendered text. Change the records, or set data.template=alpaca."
        )

    def _asked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process's answer; one that ended without an answer starts anew with the next question."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                # It may have ended since it answered last.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(variables) + "\n")
                    process.stdin.flush()
                line = process.stdout.readline()
            except BaseException:
                # Such as Ctrl-C: the answer to this question must not be taken for that to the next one.
                self._end()
                raise
            if line:
                return json.loads(line)
            self._end()
            return {"fault": _how_it_ended(process.returncode), "compiled": True}

    def _running(self) -> subprocess.Popen[str]:
        # A forked process has a copy of this object, and no right to its parent's pipes.
        if self._process is not None and self._owner == os.getpid():
            return self._process
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            # Ctrl-C is for the process that asks.
            start_new_session=True,
        )
        self._process, self._owner = process, os.getpid()
        self._finalizer = weakref.finalize(self, _kill, process, self._owner)
        assert process.stdin is not None
        process.stdin.write(json.dumps({**self._start, "path": sys.path}) + "\n")
        return process

    def _end(self) -> None:
        self._finalizer()
        self._process = None


def _as_condition(tag: re.Match[str]) -> str:
    # transformers' own tag marks the answer and prints its body unchanged; so does a condition that always holds.
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def _no_template(fault: str) -> RecipeError:
    return RecipeError(
        f"chat template: found {fault}; expected a Jinja template that compiles. "
        "Set data.template=alpaca, or choose another model."
    )


def _kill(process: subprocess.Popen[str], owner: int) -> None:
    if owner == os.getpid():
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            # What was not written yet cannot be written any more.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGPROF:
        return "a template that takes more than 2 seconds"
    return f"a template that ends the process that renders it ({code})"
