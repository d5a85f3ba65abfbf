"""What is written stands whole or not at all, and every refusal of the disk is one clear error."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keeptune import storage
from keeptune.errors import FolderInUseError, StorageError
from keeptune.storage import (
    locked_folder,
    read_json,
    remove_leftovers,
    require_space,
    staged_folder,
    verify_folder,
    write_atomic,
    write_json,
    write_jsonl,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    write_atomic(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left; expected a place to read and write\. Remedy: free space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_lines_keep_every_character(tmp_path: Path) -> None:
    values = [{"text": "zwei\nZeilen \u2028 \ud800"}, {"text": "🙂"}]
    write_jsonl(tmp_path / "a.jsonl", iter(values))
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8", errors="surrogatepass").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == values


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n"a": }')
    with pytest.raises(StorageError, match=r"a\.json:2: found broken JSON"):
        read_json(path)
    with pytest.raises(StorageError, match=r"none\.json: no such file or folder"):
        read_json(tmp_path / "none.json")


def test_a_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target, facts={"key": "k"}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(b"abc")
        assert not target.exists()
    manifest = verify_folder(target)
    assert manifest is not None
    assert manifest["key"] == "k"
    assert manifest["files"]["sub/a.bin"]["bytes"] == 3
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target, facts={"key": 1}) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(target, facts={"key": 2}) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_any_damage_is_seen(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "out"
    with staged_folder(target, facts={}) as folder:
        (folder / "a").write_bytes(b"0123456789")
    assert verify_folder(target) is not None
    path = target / "a"
    if damage == "flip":
        path.write_bytes(b"0123456780")
    elif damage == "truncate":
        path.write_bytes(b"")
    elif damage == "remove":
        path.unlink()
    else:
        (target / "manifest.json").write_text("[]")
    assert verify_folder(target) is None


KILLED = """
import os, sys
from pathlib import Path
from keeptune import storage
target, deadly = Path(sys.argv[1]), int(sys.argv[2])
count = 0
def counted(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == deadly:
            os._exit(9)
        return function(*args, **kwargs)
    return call
os.fsync = counted(os.fsync)
Path.rename = counted(Path.rename)
Path.replace = counted(Path.replace)
Path.mkdir = counted(Path.mkdir)
storage.shutil.rmtree = counted(storage.shutil.rmtree)
with storage.staged_folder(target, facts={"key": "new"}) as folder:
    (folder / "a").write_text("new")
"""


def test_a_kill_at_any_operation_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    codes = []
    for deadly in range(1, 40):
        place = tmp_path / str(deadly)
        with staged_folder(place / "out", facts={"key": "old"}) as folder:
            (folder / "a").write_text("old")
        command = [sys.executable, "-c", KILLED, str(place / "out"), str(deadly)]
        codes.append(subprocess.run(command, check=False).returncode)
        remove_leftovers(place)
        manifest = verify_folder(place / "out")
        assert manifest is not None
        assert (place / "out" / "a").read_text() == manifest["key"]
        assert os.listdir(place) == ["out"]
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert codes.count(9) >= 8


def test_leftovers_go_and_links_stay(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    run = tmp_path / "run"
    (run / "x.tmp-0123abcd").mkdir(parents=True)
    (run / ".y.tmp-0123abcd").write_text("")
    (run / "keep").write_text("")
    (run / "x.tmp-backup").mkdir()
    (run / "z.tmp-0123abcd").symlink_to(victim)
    remove_leftovers(run)
    assert sorted(os.listdir(run)) == ["keep", "x.tmp-backup", "z.tmp-0123abcd"]
    assert victim.exists()
    remove_leftovers(tmp_path / "none")


def _hold(path: str, ready: object, done: object) -> None:
    with locked_folder(Path(path)):
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_second_process_is_refused_and_a_dead_holder_is_not_waited_for(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=_hold, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(FolderInUseError, match="found in use by another keeptune process"), locked_folder(tmp_path):
        pass
    holder.kill()
    holder.join()
    with locked_folder(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(StorageError, match=r"\.lock: a symbolic link stands where a file"),
        locked_folder(tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="a file stands where a folder is expected"),
        locked_folder(tmp_path / "file" / "x"),
    ):
        pass


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    require_space(tmp_path, needed_bytes=1)
    with pytest.raises(StorageError, match=r"GB free; expected at least 1000000000\.00 GB"):
        require_space(tmp_path, needed_bytes=10**18)


def test_temporary_names_never_end_up_in_a_manifest(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", facts={}) as folder:
        write_json(folder / "a.json", {})
    assert list(read_json(tmp_path / "out" / storage.MANIFEST)["files"]) == ["a.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_of_a_staged_folder_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with storage.staged_folder(tmp_path / "model", facts={}) as staging:
            (staging / "config.json").write_text("{}")
            weights = staging / "model.safetensors"
            weights.touch()
            # As safetensors leaves it.
            weights.chmod(0o600)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {mode}
