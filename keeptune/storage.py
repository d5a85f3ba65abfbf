"""The one door for durable writes: bytes and folders arrive, and are on the disk whole or not at all.

A file is written beside its place, synced, then renamed; a folder likewise, with its manifest (size and SHA-256 of
each file) written last. Every `OSError` leaves as a `StorageError` that names the path and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keeptune.errors import FolderInUseError, StorageError

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
# The key of the hash that a record has of its own content.
SEAL = "content_sha256"
# Exactly the names that this project gives: a user's own `x.tmp-backup` is none of them.
_LEFTOVER = re.compile(r".+\.tmp-([a-z]+-)?[0-9a-f]{8}")
_REMEDIES = {
    errno.ENOSPC: ("no space left", "free space on the disk, then give the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free space, then give the same command again"),
    errno.EFBIG: ("the file is larger than the limit of this process", "raise it (ulimit -f), then go on"),
    errno.EACCES: ("permission denied", "choose a folder that you may write to with output_dir"),
    errno.EPERM: ("operation not permitted", "choose a folder that you may write to with output_dir"),
    errno.EROFS: ("the file system is read-only", "choose another folder with output_dir"),
    errno.EEXIST: ("a file stands where a folder is expected", "move that file, or choose another output_dir"),
    errno.ENOTDIR: ("a file stands where a folder is expected", "move that file, or choose another output_dir"),
    errno.EISDIR: ("a folder stands where a file is expected", "move that folder, or choose another output_dir"),
    errno.ELOOP: ("a symbolic link stands where a file is expected", "remove it, then give the same command again"),
    errno.ENOENT: ("no such file or folder", "check that nothing removed it, then give the same command again"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, then give the same command again"),
    errno.EMFILE: ("too many open files", "raise the limit of this process (ulimit -n), then go on"),
    errno.ENFILE: ("too many open files on this machine", "close other programs, then go on"),
}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn every `OSError` inside the block into a `StorageError` about `path`."""
    try:
        yield
    except OSError as error:
        raise refusal(str(path), error) from error


def refusal(where: str, error: OSError) -> StorageError:
    """Return what says that the disk, or the machine, refused something."""
    unknown = (str(error), "check the disk, then give the same command again")
    found, remedy = _REMEDIES.get(error.errno or 0, unknown)
    too_many = error.errno in (errno.EMFILE, errno.ENFILE)
    expected = "to open one more" if too_many else "a place to read and write"
    return StorageError(f"{where}: {found}; expected {expected}. Remedy: {remedy}.")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; readers see the old file or the new one, never a part.

    Raises:
        StorageError: the disk refuses; the old file stands untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(4)}")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused with `ValueError`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON object a line, atomically and streaming."""
    lines = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)
    write_lines(path, (line.encode("utf-8", "surrogatepass") for line in lines))


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines, each with its end, atomically and streaming."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(4)}")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        StorageError: the file is missing or is not JSON.
    """
    try:
        return _parsed(path)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise StorageError(
            f"{path}{line}: found broken JSON ({error}); expected the file as it was written. Put it back from a "
            "copy, or remove the folder that it stands in and give the same command again."
        ) from error


def _parsed(path: Path) -> Any:
    with storage_errors(path):
        content = path.read_bytes()
    return json.loads(content.decode("utf-8", "surrogatepass"))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        StorageError: the file is missing, is not JSON or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise StorageError(
            f"{path}: found JSON {type(value).__name__}; expected an object. Put the file back from a copy."
        )
    return value


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object together with a hash of its content, atomically; `read_record` checks it."""
    write_json(path, {**value, SEAL: _content_sha256(json.loads(json.dumps(value)))})


def read_record(path: Path, *, again: str = "`keeptune run`") -> dict[str, Any]:
    """Return the object that `write_record` wrote; `again` is the command that writes the file anew.

    Raises:
        StorageError: the file is missing or its content has changed.
    """
    exists = path.is_file()
    try:
        value = _parsed(path) if exists else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.pop(SEAL, None) != _content_sha256(value):
        found = "content that differs from its hash" if exists else "no such file"
        raise StorageError(
            f"{path}: found {found}; expected the file as keeptune wrote it. Put it back from a copy, or remove it "
            f"and give {again} again, which writes it anew."
        )
    return value


def write_sealed_text(path: Path, text: str) -> None:
    """Write lines with a hash of them as the last one, a comment that begins with #; `read_sealed_text` checks it."""
    write_atomic(path, f"{text}# {SEAL}: {hashlib.sha256(text.encode('utf-8')).hexdigest()}\n")


def is_sealed_text(path: Path) -> bool:
    """Tell whether a file holds what `write_sealed_text` wrote, unchanged."""
    with storage_errors(path):
        content = path.read_bytes() if path.is_file() else b""
    text, _, seal = content.rpartition(f"# {SEAL}: ".encode())
    return seal.decode("ascii", "replace") == f"{hashlib.sha256(text).hexdigest()}\n"


def read_sealed_text(path: Path) -> str:
    """Return the lines that `write_sealed_text` wrote.

    Raises:
        StorageError: they have changed.
    """
    if not is_sealed_text(path):
        raise StorageError(
            f"{path}: found content that differs from its hash; expected the file as keeptune wrote it. Give "
            "`keeptune run` with the recipe again, which writes it anew."
        )
    with storage_errors(path):
        return path.read_text(encoding="utf-8").rpartition(f"# {SEAL}: ")[0]


def _content_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with storage_errors(path), path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def staged_folder(target: Path, *, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well, it becomes `target`, whole and synced.

    `manifest.json` is written last: `facts` plus `files`, {relative path: {"bytes", "sha256"}}. An older `target` is
    moved aside first and removed after the new one stands. When the block raises, nothing of it remains.

    Raises:
        StorageError: the disk refuses; an older `target` stands untouched.
    """
    staging = target.with_name(f"{target.name}{_TEMPORARY}{secrets.token_hex(4)}")
    try:
        with storage_errors(target):
            staging.mkdir(parents=True)
        yield staging
        with storage_errors(target):
            paths = sorted(path for path in staging.rglob("*") if path.is_file())
            # safetensors writes files that only their owner may read; the folder's mode follows the umask.
            mode = staging.stat().st_mode & 0o666
            files = {path.relative_to(staging).as_posix(): _synced_file(path, mode=mode) for path in paths}
            write_record(staging / MANIFEST, {**facts, "files": files})
            for folder in [p for p in staging.rglob("*") if p.is_dir()]:
                _sync_folder(folder)
            _swap_in(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _synced_file(path: Path, *, mode: int) -> dict[str, Any]:
    if path.stat().st_mode & 0o666 != mode:
        path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _swap_in(staging: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}{_TEMPORARY}old-{secrets.token_hex(4)}")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify_folder(folder: Path) -> dict[str, Any] | None:
    """Return a staged folder's manifest if it and every file are as they were written, else None."""
    return read_record(folder / MANIFEST) if changed_file(folder) is None else None


def changed_file(folder: Path) -> Path | None:
    """Return the first file of a staged folder that is missing or not as it was written, its manifest before others."""
    try:
        manifest = read_record(folder / MANIFEST)
        return _changed_file(folder, manifest)
    except StorageError:
        return folder / MANIFEST


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a staged folder's manifest; an empty one where there is none, or one that another tool wrote.

    Raises:
        StorageError: the manifest has changed.
    """
    path = folder / MANIFEST
    try:
        value = _parsed(path) if path.is_file() else {}
        is_foreign = isinstance(value, dict) and not value.keys() & {"files", "versions", SEAL}
    except (ValueError, RecursionError):
        is_foreign = False
    return {} if is_foreign else read_record(path)


def require_unchanged(folder: Path) -> None:
    """Refuse a folder in which a file differs from what its manifest says; a folder without a manifest passes.

    Raises:
        StorageError: which file changed, or the manifest itself did.
    """
    manifest = read_manifest(folder)
    changed = _changed_file(folder, manifest) if manifest else None
    if changed is not None:
        raise StorageError(
            f"{changed}: found a file that differs from what {MANIFEST} beside it says, or none; expected it as "
            f"keeptune wrote it. Put it back from a copy, or let the command that wrote {folder} write it again. If "
            f"the change was meant, remove {folder / MANIFEST}: the folder is then read as it is."
        )


def _changed_file(folder: Path, manifest: Mapping[str, Any]) -> Path | None:
    """Return the first file that is not as the manifest says."""
    for name, facts in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
            return path
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written directly in `folder`.

    A `.tmp-old-` folder whose successor never took its place is put back first, so that nothing finished is lost.
    """
    if not folder.is_dir():
        return
    with storage_errors(folder):
        for path in sorted(folder.iterdir()):
            if not _LEFTOVER.fullmatch(path.name) or path.is_symlink():
                continue
            target = path.with_name(path.name.split(_TEMPORARY)[0])
            if f"{_TEMPORARY}old-" in path.name and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` (created when missing) for this process; the lock dies with its holder.

    Raises:
        FolderInUseError: another process holds it.
        StorageError: the folder cannot be created or written to.
    """
    import fcntl

    with storage_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            # Of a file system that lets nobody make a folder, such as /proc.
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from error
    lock = folder / ".lock"
    with storage_errors(lock):
        # A link would let whoever set it choose which file is made or opened.
        file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(
                f"{folder}: found in use by another keeptune process; expected it free. "
                "Wait for that process, or choose another output_dir."
            ) from error
        yield


def require_space(folder: Path, *, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        StorageError: fewer than `needed_bytes` are free below `folder`.
    """
    with storage_errors(folder):
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{folder}: found {free_bytes / 1e9:.2f} GB free; expected at least {needed_bytes / 1e9:.2f} GB for the "
            "checkpoints of this run. Free space, or choose another output_dir."
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
