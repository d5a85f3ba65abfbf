"""Chat templates: messages in, rendered text out. Templates are untrusted code, so another process renders them."""

from __future__ import annotations

import contextlib
import datetime
import functools
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

from keeptune.errors import RecipeError

_WORKER = Path(__file__).with_name("chat_worker.py")
# The date that Llama's own template falls back to; one record must render alike on every day.
_FIXED_DATE = datetime.date(2024, 7, 26)
_DATE = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


def with_fixed_date(source: str) -> str:
    """Return a chat template that says of every day what records are rendered with."""
    return _DATE.sub(lambda found: json.dumps(_FIXED_DATE.strftime(found[1] or found[2])), source)


class UnboundedTemplateError(RecipeError):
    """A template that takes too long or ends the process that renders it; it is not tried with other conversations."""


class ChatWording:
    """A chat template with the tokens that it may name.

    Its process starts with the first question, and ends with this object or with the process that made it.
    """

    def __init__(self, source: str, *, role_tokens: Mapping[str, str]) -> None:
        self._start = {"source": source, "role_tokens": dict(role_tokens), "date": _FIXED_DATE.isoformat()}
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    @property
    def literals(self) -> Set[str]:
        """The texts that stand in the template, as text or as string constants."""
        return self._named["literals"]

    def reads(self, key: str) -> bool:
        """Return whether the template names the attribute or key `key` of anything."""
        return key in self._named["keys"]

    def has_variable(self, name: str) -> bool:
        """Return whether the template uses the variable `name`."""
        return name in self._named["variables"]

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
                512 MB.
            UnboundedTemplateError: it takes more than 2 seconds, or ends its process.
        """
        variables = {**(switches or {}), "messages": list(messages), "tools": tools, "documents": None}
        reply = self._asked({**variables, "add_generation_prompt": add_generation_prompt})
        if "text" in reply:
            return reply["text"]
        roles = ", ".join(message["role"] for message in messages)
        raise (UnboundedTemplateError if reply.get("ended") else RecipeError)(
            f"chat template: found {reply['fault']} for a conversation of the roles {roles}; "
            "expected rendered text. Change the records, or set data.template=alpaca."
        )

    @functools.cached_property
    def _named(self) -> dict[str, frozenset[str]]:
        return {kind: frozenset(names) for kind, names in self._asked(None).items()}

    def _asked(self, variables: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the process's answer: a rendered text, or what the template names where there are no variables.

        Raises:
            RecipeError: the template does not compile.
        """
        reply = self._exchanged(variables)
        if reply.get("compiled", True):
            return reply
        raise RecipeError(
            f"chat template: found {reply['fault']}; expected a Jinja template that compiles. "
            "Set data.template=alpaca, or choose another model."
        )

    def _exchanged(self, variables: Mapping[str, Any] | None) -> dict[str, Any]:
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
            return {"fault": _how_it_ended(process.returncode), "compiled": True, "ended": True}

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
