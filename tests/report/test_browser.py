"""A real browser opens a hostile page: nothing runs, nothing is asked for, and the policy has nothing to report."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from keeptune.report.page import write_report
from tests.report.test_page import PAYLOADS, write_poisoned_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_chromium_finds_nothing_to_forbid_on_a_hostile_page(tmp_path: Path) -> None:
    page = write_report(write_poisoned_run(tmp_path / "run", " ".join(PAYLOADS)))
    control = page.with_name("control.html")
    text = page.read_text(encoding="utf-8")
    control.write_text(text.replace("<main>", '<main><p style="color:red"></p><script>1</script>'), encoding="utf-8")
    frames = tmp_path / "frames.html"
    frames.write_text(f'<iframe src="{page.as_uri()}"></iframe><iframe src="{control.as_uri()}"></iframe>')
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frames.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    reports = [line for line in result.stderr.splitlines() if ":CONSOLE:" in line]
    # The control shows that a violation would have been seen.
    assert len([line for line in reports if re.search(r"Content Security Policy.*control\.html", line)]) == 2
    assert [line for line in reports if "control.html" not in line] == []
