"""The driver: crashes are results, kills are not, and a search that is stopped anywhere ends in the same trials."""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from keeptune.errors import FolderInUseError, Interrupted, RecipeError, StorageError
from keeptune.search import sampler
from keeptune.search.rounds import num_expected
from keeptune.search.study import DIGEST, JOURNAL
from keeptune.search.trials import Result, Trial
from keeptune.storage import write_record
from tests.search.simulated import Machine, finished, search, value_of


def test_every_trial_is_made_once_and_the_two_best_with_two_more_seeds(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    found = machine.run(search())
    assert sorted(machine.started) == sorted(found) == sorted(machine.told)
    first = {name: value for name, (_, value) in found.items() if "seed" not in name}
    assert sorted(first) == [f"trial-{i:04d}" for i in range(6)]
    best = sorted(first, key=lambda name: first[name])[:2]
    assert set(found) - set(first) == {f"{name}-seed-{i}" for name in best for i in (1, 2)}
    assert machine.run(search()) == found
    assert len(machine.started) == num_expected(search()) == 10


@pytest.mark.parametrize("num_jobs", [1, 3])
def test_a_search_stopped_after_each_trial_ends_in_the_same_trials(tmp_path: Path, num_jobs: int) -> None:
    whole = Machine(tmp_path / "whole").run(search(num_jobs=num_jobs))
    machine = Machine(tmp_path / "stopped")
    for after in (1, 2, 1, 3, 1, 2, 1, 4):
        machine.run_until_stopped(search(num_jobs=num_jobs), after=after)
    assert machine.run(search(num_jobs=num_jobs)) == whole


def test_a_killed_process_is_started_again_and_changes_nothing(tmp_path: Path) -> None:
    whole = Machine(tmp_path / "whole").run(search())
    killed = Machine(tmp_path / "killed", codes={"trial-0001": [-9, 137], "trial-0004": [143], "trial-0005": [7]})
    assert killed.run(search()) == whole
    assert killed.started.count("trial-0001") == 3
    assert killed.again == ["trial-0001", "trial-0001", "trial-0004", "trial-0005"]


def test_what_is_killed_three_times_is_a_failure(tmp_path: Path) -> None:
    machine = Machine(tmp_path, codes={"trial-0001": [-9, -9, -9]}, said="loading\n")
    assert machine.run(search())["trial-0001"][1] is None
    reason = machine.study().results()["trial-0001"].reason
    assert reason == "killed 3 times, as where there is too little memory. loading"


def test_a_crash_is_a_failure_with_the_last_lines_that_it_said_and_not_the_end(tmp_path: Path) -> None:
    said = "".join(f"line {i}\n" for i in range(9))
    machine = Machine(tmp_path, codes={"trial-0000": [1], "trial-0003": [6]}, said=said)
    found = machine.run(search())
    failed = [name for name, (_, value) in found.items() if value is None]
    assert failed == ["trial-0000", "trial-0003"]
    assert machine.study().results()["trial-0000"].reason == "line 5\nline 6\nline 7\nline 8"
    silent = Machine(tmp_path / "silent", codes={"trial-0000": [9]})
    silent.run(search(num_trials=1))
    assert silent.study().results()["trial-0000"].reason == "ended with exit code 9 and said nothing"


def test_a_full_disk_ends_the_search_and_loses_nothing(tmp_path: Path) -> None:
    said = "a library's warning\nkeeptune: x: no space left; expected a place to read and write.\n"
    machine = Machine(tmp_path / "full", codes={"trial-0003": [4]}, said=said)
    with pytest.raises(StorageError, match=r"^x: no space left; expected a place to read and write\.$"):
        machine.run(search())
    before = finished(machine.study())
    assert len(before) == 3
    whole = Machine(tmp_path / "whole").run(search())
    after = machine.run(search())
    assert after == whole
    assert before.items() <= after.items()


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.85])
def test_a_journal_that_the_disk_has_no_room_for_is_mended_and_loses_nothing(tmp_path: Path, share: float) -> None:
    whole = Machine(tmp_path / "whole").run(search(num_trials=3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    machine = Machine(tmp_path / "full")
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (int(share * (tmp_path / "whole" / JOURNAL).stat().st_size), limits[1])
        )
        with pytest.raises(StorageError, match=f"{JOURNAL}: the file is larger than the limit of this process"):
            machine.run(search(num_trials=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert machine.run(search(num_trials=3)) == whole


def test_a_journal_that_cannot_grow_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Machine(tmp_path).study()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study._study, "enqueue_trial", full)
    with pytest.raises(StorageError, match=f"{JOURNAL}: no space left"):
        study.queue([Trial(0, {"methods.full.learning_rate": 1e-3, "methods.full.l2_base": 0})])


def test_a_line_that_was_cut_while_it_was_written_is_taken_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.run_until_stopped(search(), after=4)
    before = finished(machine.study())
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / JOURNAL)
    assert finished(machine.study()) == before
    assert machine.run(search()) == Machine(tmp_path / "whole").run(search())


def test_a_journal_of_which_a_digit_changed_is_refused_and_made_again_from_the_trials(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    whole = machine.run(search(num_trials=4))
    path = tmp_path / JOURNAL
    content = path.read_bytes()
    place = content.rindex(b"0.") + 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(StorageError) as error:
        machine.study()
    assert str(error.value) == (
        f"{path}: found content that differs from its hash in {DIGEST}; expected the journal as keeptune wrote it. Put "
        "it back from a copy, or remove it and give the same command again: it takes the results of finished trials "
        "from their folders."
    )
    path.unlink()
    started = list(machine.started)
    assert machine.run(search(num_trials=4)) == whole
    assert machine.started == started


@pytest.mark.parametrize("damage", [lambda lines: lines[:-1], lambda lines: [], lambda lines: [*lines, b"changed\n"]])
def test_a_journal_with_lines_removed_or_added_is_refused(tmp_path: Path, damage: Callable[..., list[bytes]]) -> None:
    machine = Machine(tmp_path)
    machine.run(search(num_trials=2))
    path = tmp_path / JOURNAL
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(StorageError, match=rf"{JOURNAL}.*: found .*; expected the journal as keeptune wrote it"):
        machine.study()


def test_a_journal_whose_hash_is_gone_or_changed_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.run(search(num_trials=2))
    path = tmp_path / DIGEST
    for content in (b"", b"[]", path.read_bytes().replace(b'"num_bytes": ', b'"num_bytes": 1')):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=f"{DIGEST}: found content that differs from its hash"):
            machine.study()


def test_a_study_of_another_recipe_is_refused_with_both_hashes(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.study(key="a" * 64)
    with pytest.raises(FolderInUseError) as error:
        machine.study(key="b" * 64)
    assert f"(hash {'a' * 16}, now {'b' * 16}); expected the same to go on. Choose another output_dir" in str(
        error.value
    )


def test_more_trials_go_on_from_the_ones_that_stand(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    four = machine.run(search(num_trials=4))
    eight = machine.run(search(num_trials=8))
    assert four.items() <= eight.items()
    assert len([name for name in eight if "seed" not in name]) == 8


def test_a_driver_that_died_between_two_lines_of_the_journal_loses_no_trial(tmp_path: Path) -> None:
    whole = Machine(tmp_path / "whole").run(search(num_trials=2, num_jobs=1))
    lines = (tmp_path / "whole" / JOURNAL).read_text().splitlines(keepends=True)
    for i in range(1, len(lines), 4):
        folder = tmp_path / f"cut-{i}"
        folder.mkdir()
        (folder / JOURNAL).write_text("".join(lines[:i]))
        # The hash was last written some lines before.
        known = "".join(lines[: i // 2]).encode()
        write_record(folder / DIGEST, {"num_bytes": len(known), "sha256": hashlib.sha256(known).hexdigest()})
        assert Machine(folder).run(search(num_trials=2, num_jobs=1)) == whole, f"after line {i}: {lines[i - 1]}"


def test_what_a_dead_driver_left_running_is_failed_and_queued_again_with_the_same_settings(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.run_until_stopped(search(num_jobs=2), after=4)
    study = machine.study()
    before, done = study.trials(), study.results()
    assert [t.state.name for t in study._study.get_trials() if t.state.name == "RUNNING"] == []
    left = set(before) - set(done)
    assert left
    # With more jobs a round is larger, and its settings would be others.
    machine.run(search(num_jobs=3))
    after = machine.study()
    assert {name: after.trials()[name].params for name in before} == {n: t.params for n, t in before.items()}
    assert left <= set(after.results())


def test_a_stop_says_how_to_go_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "search")
    machine.stop_after = 1
    with pytest.raises(Interrupted, match=r"stopped on request; every finished trial stands\. Give the same"):
        machine.run(search())


def test_halving_tries_all_on_a_ninth_and_drops_what_another_beats_in_value_and_drift(tmp_path: Path) -> None:
    machine = Machine(tmp_path, drift=lambda trial: 1.0 - value_of(Trial(trial.number, trial.params)))
    free = Machine(tmp_path / "free")
    found = machine.run(search(num_trials=9, num_jobs=3, halving=True))
    alone = free.run(search(num_trials=9, num_jobs=3, halving=True))
    count = {short: sum(f"-short-{short}" in name for name in alone) for short in (9, 3)}
    assert count == {9: 9, 3: 3}
    # Two, so that they can be tried again with two more seeds: one alone would have nothing to be better than.
    assert sum("short" not in name and "seed" not in name for name in alone) == 2
    assert sum("seed" in name for name in alone) == 4
    # Where what is worse in value drifted less, nothing dominates anything: none is dropped.
    assert sum("-short-3" in name for name in found) == 9
    assert sum("short" not in name and "seed" not in name for name in found) == 9


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"optuna: not installed.*pip install 'keeptune\[search\]'"):
        sampler.optuna()


def test_a_trial_ends_with_its_driver() -> None:
    code = "import time; from keeptune.invocation import end_with_driver; end_with_driver(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=30) == 137


def test_a_result_survives_the_journal(tmp_path: Path) -> None:
    study = Machine(tmp_path).study()
    trial = Trial(3, {"methods.full.learning_rate": 1e-3, "methods.full.l2_base": 0.5}, repeat=1)
    study.queue([trial])
    begun = study.begin()
    assert begun is not None and begun.trial == trial
    result = Result(trial, "finished", value=1.5, drift=0.1, excess=-0.5, drops={"self": 0.01}, seconds=2.0)
    study.tell(begun, result)
    assert Machine(tmp_path).study().results() == {"trial-0003-seed-1": result}
    assert study.begin() is None
    assert json.loads((tmp_path / JOURNAL).read_text().splitlines()[0])
