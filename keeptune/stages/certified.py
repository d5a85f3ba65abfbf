"""Certified folders arrive; whether they still hold the files that their certificate names leaves.

A certificate speaks of files by their hashes. A folder whose files are others has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.errors import DataError
from keeptune.storage import MANIFEST, file_sha256, read_record, verify_folder

CERTIFICATE = "certificate.json"
# Of the certificates of single folders, in the run's folder.
CERTIFICATES = "certificates"
# What decides the answers of a model folder beside its weights.
_TEXT_SIDE = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SHOWN_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Changed:
    """A file of a certified folder whose hash, `found`, is not the certificate's, `expected`; None: no such file."""

    certificate: Path
    file: Path
    found: str | None
    expected: str | None

    def __str__(self) -> str:
        found = "no such file" if self.found is None else f"the hash {self.found[:_SHOWN_DIGITS]}"
        if self.expected is None:
            return f"{self.file}: found {found}; expected no such file, as {self.certificate} names none"
        return (
            f"{self.file}: found {found}; expected {self.expected[:_SHOWN_DIGITS]}, which {self.certificate} speaks of"
        )


def artifact_sha256(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that decides what the model or adapter in a folder answers, by its name."""
    files = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in _TEXT_SIDE)]
    return {file.name: file_sha256(file) for file in files if file.is_file()}


def changed_file(certificate: Path) -> Changed | None:
    """Return the first file that is another than when the certificate was made.

    None where there is none, and where nothing is certified, or a folder that is gone.
    """
    folder, hashes = _artifact(certificate)
    if folder is None or not folder.is_dir():
        return None
    now = artifact_sha256(folder)
    for name in sorted({*hashes, *now}):
        if now.get(name) != hashes.get(name):
            return Changed(certificate, folder / name, now.get(name), hashes.get(name))
    return None


def names_what_stands(certificate: Path) -> bool:
    """Tell whether the folder that a certificate speaks of is there as it was; true where nothing is certified."""
    folder, _ = _artifact(certificate)
    return folder is None or (changed_file(certificate) is None and verify_folder(folder) is not None)


def certificates_of(folder: Path, *, runs: Iterable[Path]) -> Iterator[Path]:
    """Yield the certificates in run folders by which this folder is certified."""
    for run in runs:
        for path in (run / CERTIFICATE, *sorted((run / CERTIFICATES).glob("*.json"))):
            named = _artifact(path)[0] if path.is_file() else None
            if named is not None and named.resolve() == folder.resolve():
                yield path


def refuse_changed(folder: Path, *, runs: Iterable[Path]) -> None:
    """Refuse a folder that was certified and holds other files now; one certified again as it is, or never, passes.

    Raises:
        DataError: which file, its hash, and the one that the certificate names.
    """
    changes = [changed_file(path) for path in certificates_of(folder, runs=runs)]
    if changes and all(changes):
        own = changes[0] is not None and changes[0].certificate.name == CERTIFICATE
        again = "`keeptune certify RECIPE` puts the certified model back" if own else "Put the file back"
        without = f"without its {MANIFEST}, " if (folder / MANIFEST).is_file() else ""
        raise DataError(
            f"{changes[-1]}. {again}; {without}`keeptune certify RECIPE --artifact {folder}` certifies what stands "
            "there now."
        )


def _artifact(certificate: Path) -> tuple[Path | None, Mapping[str, str]]:
    value: dict[str, Any] = read_record(certificate, again="`keeptune certify`")
    # Of a folder that was not certified nothing is claimed.
    artifact = value["artifact"] if value["verdict"] == "CERTIFIED" else None
    # The run's own certificate names its folder from where it stands, another one the whole path.
    return (certificate.parent / artifact["folder"], artifact["sha256"]) if artifact else (None, {})
