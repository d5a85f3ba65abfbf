"""The process that renders chat templates, which are untrusted code, under limits of memory and time.

`chat.py` starts it by its path and sends one line of JSON with the template, then one for each conversation, or `null`
to ask what the template names; each is answered by one line. The sandbox is that of transformers (same filters, same
globals, same whitespace rules), but nothing in it depends on the clock. What passes a limit ends the process, or is a
fault like any other.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_CPU_SECONDS = 2.0
_MEMORY_BYTES = 512 * 1024 * 1024
_MAX_CHARACTERS = 4 * 1024 * 1024
_MAX_SHOWN = 500
_GENERATION_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def main() -> None:
    """Compile the template of the first line and render one conversation for each line that follows."""
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    import jinja2

    _limit_memory_and_files()
    faults = (*_FAULTS, jinja2.TemplateError)
    template, names = None, {}
    for line in sys.stdin:
        # No handler is installed: the signal ends the process, whatever it is in the midst of.
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        try:
            if template is None:
                template, names = _compiled(start["source"], today=datetime.date.fromisoformat(start["date"]))
            variables = json.loads(line)
            reply = names if variables is None else {"text": _rendered(template, {**start["role_tokens"], **variables})}
        except faults as error:
            fault = f"{type(error).__name__} ({str(error)[:_MAX_SHOWN]})"
            if isinstance(error, MemoryError):
                fault = f"a template that takes more than {_MEMORY_BYTES >> 20} MB"
            reply = {"fault": fault, "compiled": template is not None}
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _limit_memory_and_files() -> None:
    """Allow 512 MB more address space than the process has now, where Linux tells how much that is, and no files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with contextlib.suppress(OSError, ValueError), Path("/proc/self/statm").open(encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _compiled(source: str, *, today: datetime.date) -> tuple[Any, dict[str, list[str]]]:
    """Return the template, and what it names: variables, keys of anything, and the texts that stand in it."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": today.strftime}
    tree = environment.parse(_GENERATION_TAG.sub(_as_condition, source))
    strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    names = {
        "variables": {node.name for node in tree.find_all(nodes.Name)},
        "keys": strings | {node.attr for node in tree.find_all(nodes.Getattr)},
        "literals": strings | {node.data for node in tree.find_all(nodes.TemplateData)},
    }
    return environment.from_string(tree), {kind: sorted(found) for kind, found in names.items()}


def _rendered(template: Any, variables: Mapping[str, Any]) -> str:
    text = template.render(**variables)
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"more than {_MAX_CHARACTERS} characters of output")
    return text


def _as_condition(tag: re.Match[str]) -> str:
    # transformers' own tag marks the answer and prints its body unchanged; so does a condition that always holds.
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def _to_json(value: object, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


if __name__ == "__main__":
    main()
