"""The command line as a user meets it: help at once, one message for a fault, the right exit code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keeptune import cli, invocation
from keeptune.errors import DataError
from tests.stages import world


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Give a command as a user does, in a process of its own: seconds of imports."""
    command = [sys.executable, "-m", "keeptune.cli", *map(str, arguments)]
    limits = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limits}, check=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return world.recipe_file(
        folder, model=world.llama(folder / "base"), data=world.records(folder / "data.jsonl", number=40)
    )


def test_a_fault_is_one_message_and_its_exit_code(path: Path) -> None:
    result = process("run", path, "--set", "training.num_epochs=1")
    assert result.returncode == 2
    assert result.stderr.startswith("keeptune: ")
    assert "Did you mean 'num_train_epochs'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert process("run").returncode == 2
    assert process("run", path, "--no-such-flag").returncode == 2


@pytest.mark.parametrize(
    ("command", "override", "code", "message"),
    [
        ("prepare", "data.tasks.0.path=none.jsonl", 3, "recipe.yaml: data.tasks.0.path: none.jsonl: found no such"),
        ("prepare", "model=./none", 2, "recipe.yaml: model: found no folder './none'"),
        ("check", "model=./none", 2, "recipe.yaml: model: found no folder './none'"),
        ("check", "methods.lora.peft_type=LORRA", 2, "recipe.yaml: methods.lora.peft_type: found 'LORRA'"),
        ("prepare", "evaluation.metrics=[rougL]", 2, "Did you mean rougeL?"),
        ("train", "methods.lora.rank=4", 2, "expected an argument of PEFT's LoraConfig"),
        ("prepare", "output_dir=/dev/null/x", 4, "a file stands where a folder is expected"),
        ("prepare", "output_dir=/proc/foo", 4, "choose a folder that you may write to with output_dir"),
        ("prepare", "data.max_length=8", 3, "data.over_length"),
    ],
)
def test_each_kind_of_fault_has_its_exit_code(
    path: Path, keeptune: world.Keeptune, command: str, override: str, code: int, message: str
) -> None:
    result = keeptune(command, path, "--quiet", "--set", override, "--set", f"seed={code}")
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_prints_its_outcome_and_quiet_prints_less(path: Path, keeptune: world.Keeptune) -> None:
    loud = keeptune("run", path)
    assert loud.returncode == 0, loud.stderr
    assert "Selected on validation:" in loud.stdout
    run = path.parent / "run"
    assert f"Next:\n  ask the model:    see the code in {run}/instruct-model/README.md\n" in loud.stdout
    assert f"compare {run} OTHER_RUN\n" in loud.stdout
    assert "steps" in loud.stderr
    assert "Records" in loud.stdout
    again = keeptune("run", path)
    assert "Records" not in again.stdout and "Selected on validation:" in again.stdout
    run = path.parent / "run"
    assert again.stderr == (
        f"{run / 'data'}: prepared, {run / 'full'}: trained, {run / 'lora'}: trained, {run}: evaluated before and "
        "unchanged\n"
    )
    other = keeptune("run", path, "--set", "seed=5")
    assert other.returncode == 7
    assert f"keeptune: {path}: output_dir: found results of another recipe in {run} (seed was 0, now 5)" in other.stderr
    quiet = keeptune("report", path, "--quiet")
    assert quiet.stderr == ""
    assert quiet.stdout == f"Report: {path.parent / 'run' / 'report.html'}\n"


def test_a_signal_saves_says_how_to_go_on_and_exits_143(path: Path) -> None:
    overrides = ["--set", f"output_dir={path.parent / 'stopped'}", "--set", "training.num_train_epochs=500"]
    command = [sys.executable, "-m", "keeptune.cli", "train", str(path), *overrides, "--set", "training.patience=null"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        events = path.parent / "stopped" / "full" / "events.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (events.exists() and '"step"' in events.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "everything up to this step is saved. Give the same command again to go on." in stderr
    assert list((path.parent / "stopped" / "full" / "checkpoints").glob("step-*"))


def test_check_prints_audit_mask_and_tokens(path: Path, keeptune: world.Keeptune) -> None:
    result = keeptune("check", path)
    assert result.returncode == 0, result.stderr
    assert "Template: chat" in result.stdout
    assert "⟦" in result.stdout
    assert "near-duplicate pairs" in result.stdout
    assert "learning rate" in result.stdout and "LORA" in result.stdout
    checked, ready = result.stdout.splitlines()[-2:]
    assert checked.startswith("Checked: 40 rows, 40 records kept (")
    # The command that it names is one that works, whether the shell finds keeptune or not.
    command = shlex.split(ready.removeprefix("Ready. Next: "))
    assert command[-2:] == ["run", str(path)] and shutil.which(command[0])


def test_commands_that_are_named_start_the_program_that_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/my tools/bin/keeptune", "lab"])
    monkeypatch.setattr(invocation.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert invocation.command_line("run", "a b.yaml") == "keeptune run 'a b.yaml'"
    monkeypatch.setattr(invocation.shutil, "which", lambda name: None)
    assert invocation.command_line("run", "a.yaml") == "'/my tools/bin/keeptune' run a.yaml"
    monkeypatch.setattr(sys, "argv", ["/x/keeptune/cli.py", "lab"])
    assert invocation.command_line("run", "a.yaml") == f"{sys.executable} -m keeptune.cli run a.yaml"


def test_a_remedy_names_a_command_that_works_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise DataError("x: found y; expected z. Run `keeptune train` first.")

    monkeypatch.setattr(cli, "load_with_ranges", refused)
    monkeypatch.setattr(invocation.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/keeptune", "check", "recipe.yaml"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "keeptune: x: found y; expected z. Run `.venv/bin/keeptune train` first.\n"


def test_every_command_is_summed_up_without_being_cut() -> None:
    lines = process("--help", COLUMNS="80").stdout.partition("Commands:")[2].splitlines()
    assert len(lines) > 8
    assert not [line for line in lines if line.endswith("...")]


def test_help_names_what_an_argument_is() -> None:
    assert "[FOLDER]" in (shown := process("lab", "--help").stdout) and "[[" not in shown
    assert "--records NUMBER" in process("check", "--help").stdout
    assert "--method NAME" in process("train", "--help").stdout


def test_a_check_shows_a_recipe_with_ranges_at_the_largest_value_of_each(path: Path, keeptune: world.Keeptune) -> None:
    ranges = "methods={full: {learning_rate: {low: 1e-5, high: 0.0625, log: true}}}"
    result = keeptune("check", path, "--set", ranges)
    assert result.returncode == 0, result.stderr
    assert "0.0625" in result.stdout
    named, ready = result.stdout.splitlines()[-2:]
    assert named == "Ranges, here with the largest value of each: methods.full.learning_rate"
    assert " search " in ready


@pytest.mark.parametrize(
    ("option", "found"), [("--trials", "-3"), ("--trials", "four"), ("--jobs", "0"), ("--trials", "1.5")]
)
def test_a_number_of_trials_that_is_none_is_refused(
    path: Path, keeptune: world.Keeptune, option: str, found: str
) -> None:
    result = keeptune("search", path, option, found)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"keeptune: {option}: found {found}; expected a whole number above 0. Write for example {option} 4.\n"
    )


def test_a_quiet_check_prints_its_outcome_alone(path: Path, keeptune: world.Keeptune) -> None:
    result = keeptune("check", path, "-q")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(
        r"Checked: 40 rows, 40 records kept \(\d+ train, \d+ validation, \d+ test\)\n", result.stdout
    ), result.stdout


def test_a_second_process_is_refused(path: Path) -> None:
    from keeptune.storage import locked_folder

    with locked_folder(path.parent / "held"):
        result = process("prepare", path, "--set", f"output_dir={path.parent / 'held'}")
    assert result.returncode == 7
    assert "found in use by another keeptune process" in result.stderr


def test_an_interrupted_check_does_not_look_like_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_with_ranges", interrupted)
    monkeypatch.setattr(sys, "argv", ["keeptune", "check", "recipe.yaml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130


@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_what_is_no_run_is_neither_reported_nor_made(path: Path, keeptune: world.Keeptune, command: str) -> None:
    folder = path.parent / "nowhere"
    result = keeptune(command, path, "--set", f"output_dir={folder}")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"output_dir: found no run in '{folder}'; expected the folder of one." in result.stderr
    assert not folder.exists()


@pytest.mark.parametrize("command", ["run", "train", "prepare"])
def test_a_model_without_weights_leaves_no_output_folder(
    path: Path, tmp_path: Path, keeptune: world.Keeptune, command: str
) -> None:
    base = shutil.copytree(path.parent / "base", tmp_path / "base")
    (base / "model.safetensors").unlink()
    result = keeptune(command, path, "--set", f"output_dir={tmp_path / 'run'}", "--set", f"model={base}")
    assert result.returncode == 2
    assert f"{base}: found no weights; expected model.safetensors." in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["data", "model"])
def test_a_file_that_is_missing_is_named_before_anything_slow_is_imported(missing: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    task = tmp_path / ("no.jsonl" if missing == "data" else "a.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: ./none\noutput_dir: {tmp_path / 'run'}\ndata: {{tasks: [{{path: {task}}}]}}\n")
    slow = ("torch", "transformers", "peft", "pyarrow", "datasets", "matplotlib")
    for command in ("check", "run", "plan"):
        code = (
            f"import sys; from keeptune import cli\nsys.argv = ['keeptune', '{command}', '{recipe}']\n"
            f"try: cli.main()\nexcept SystemExit as stop: print(stop.code, [m for m in {slow} if m in sys.modules])"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        expected = f"data.tasks.0.path: {task}: found no such file" if missing == "data" else "model: found no folder"
        assert expected in found.stderr
        assert found.stdout == f"{3 if missing == 'data' else 2} []\n"


def test_names_of_files_and_columns_cannot_steer_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"\\u001b[31mred": "a", "\\u009b2J": "b"}\n' * 2, encoding="utf-8")
    (tmp_path / "r.yaml").write_text("model: ./none\noutput_dir: run\ndata: {tasks: [{path: 'a\x1b.jsonl'}]}\n")
    (tmp_path / "s.yaml").write_text('model: m\noutput_dir: run\ndata: {tasks: [{path: "a\\e[31m.jsonl", name: a}]}\n')
    for recipe in ("r.yaml", "s.yaml"):
        found = process("check", tmp_path / recipe)
        assert found.returncode in (2, 3)
        assert "\x1b" not in found.stderr
