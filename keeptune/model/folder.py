"""The name of a base model arrives; its folder and the facts about it leave, before any weight is read.

No torch and no transformers here: `keeptune check` looks at a model in milliseconds. Nothing that a model folder brings
is ever executed: configurations that ask for code of their own and pickled weights are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from keeptune.errors import RecipeError, import_extra, relative_start
from keeptune.model.declared import (
    Quantization,
    brings_own_code,
    declared_positions,
    declared_vocab_size,
    is_encoder_decoder,
    refuse_unserved,
    require_flat,
    stored_quantisation,
)
from keeptune.storage import file_sha256, read_json_object, read_manifest, storage_errors

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"

# Only what a model needs; code and pickles are never fetched.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER_BYTES = 100_000_000
# Types of numbers, by safetensors' names, that weights have unless they are quantised.
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Neither a path nor a file that torch would open as a pickle.
_PLAIN_NAME = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class ModelFacts:
    """What the configuration and the weight files of a folder say, without loading them."""

    model_type: str
    encoder_decoder: bool
    quantised: Quantization | Literal[False]
    """In how many bits the weights are stored, where bitsandbytes has quantised them."""
    vocab_size: int
    max_positions: int | None
    """Tokens that the position embeddings were made for; None where the configuration names no limit."""
    weight_bytes: int
    num_weights: int
    """Numbers that the weight files hold; quantised weights may stand several in one."""
    files: tuple[Path, ...]
    """`config.json` and every weight file."""
    quantization: Quantization | None = None
    """How the weights are to be quantised as they are read, where they are."""
    ignored_code: bool = False
    """Whether the folder brings code of its own, which is not needed and not run."""

    @cached_property
    def sha256(self) -> str:
        """Of the files, each of which is read for it when it is first asked for, and of how they are quantised."""
        digest = hashlib.sha256(self.quantization.encode() if self.quantization else b"")
        for file in self.files:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        return digest.hexdigest()


def resolve_model(path: str) -> Path:
    """Return the local folder of a model: a path that exists, else the snapshot of the hub id `owner/name[@revision]`.

    Raises:
        RecipeError: no such folder, no such repository or revision, or the hub cannot be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise RecipeError(
            f"model: found the file {path!r}; expected a folder or a hub id. Name the folder it stands in."
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.strip() == "":
        raise RecipeError(f"model: found no folder {path!r}; expected a model folder or a hub id. {_nearest(local)}")
    return _hub_snapshot(path)


def adapter_base(folder: Path) -> str:
    """Return the base model that an adapter names, with its revision.

    Raises:
        RecipeError: it names none.
    """
    config = read_json_object(folder / ADAPTER_CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise RecipeError(
            f"{folder}: found no name of the base model; expected one. Write it into {ADAPTER_CONFIG} as "
            "base_model_name_or_path; `keeptune export` also takes it with --base."
        )
    return f"{name}@{revision}" if revision else name


def adapter_quantization(folder: Path) -> Quantization | None:
    """Return in how many bits the base model's weights stood when keeptune trained an adapter; None: as it has them."""
    return read_manifest(folder).get("quantization")


def _nearest(path: Path) -> str:
    parent = path.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {str(parent / near[0])!r}?" if near else f"Fix the path.{relative_start(path)}"


def _hub_snapshot(path: str) -> Path:
    hub = import_extra("huggingface_hub", extra="hub")
    name, _, revision = path.partition("@")
    try:
        patterns = {"allow_patterns": _HUB_PATTERNS, "ignore_patterns": ["*/*"]}
        folder = Path(hub.snapshot_download(name, revision=revision or None, **patterns))
        safe = any(folder.glob("*.safetensors"))
        names = [] if safe else hub.list_repo_files(name, revision=revision or None)
    # OSError: refused, missing or unreachable; ValueError: not a valid hub id.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(
            f"model: found neither a folder {path!r} nor such a model on the hub ({reason}); expected a model folder "
            "or a hub id owner/name[@revision]. Fix the name, or download the model and name its folder."
        ) from error
    # Pickles were not fetched: the folder alone cannot say that they are there.
    if names:
        _refuse_pickles(names, where=name, encoder_decoder=is_encoder_decoder(_read_config(folder)))
    return folder


def check_model_folder(folder: Path) -> ModelFacts:
    """Return the facts of a model folder that is complete and asks for no code of its own.

    Raises:
        RecipeError: the folder is not a model, its weights are missing, cut short or pickled, or it wants its own code.
    """
    config = _read_config(folder)
    ignored_code = brings_own_code(folder, config)
    quantised = stored_quantisation(folder, config)
    encoder_decoder = is_encoder_decoder(config)
    weights = _weight_files(folder, config)
    tensors = {name: tensor for weight in weights for name, tensor in _tensors(weight).items()}
    refuse_unserved(folder, config, num_tensors=len(tensors))
    _refuse_undeclared(folder, tensors, quantised=quantised)
    vocab_size, max_positions = declared_vocab_size(config), declared_positions(config)
    if vocab_size is None or (encoder_decoder and not _names_start(folder, config)):
        # What a configuration leaves out has the default of its class.
        from keeptune.model.load import configured

        filled = configured(folder)
        vocab_size, max_positions = filled.vocab_size, filled.max_positions
        if encoder_decoder and filled.decoder_start_token_id is None:
            raise RecipeError(
                f"{folder / 'config.json'}: found an encoder-decoder model without decoder_start_token_id; expected "
                "the id of the token that answers start with. Set it there: to the id of the target language's token "
                "for mBART, and to eos_token_id or pad_token_id for most others, as the model's page says."
            )
    if vocab_size is None:
        raise RecipeError(
            f"{folder / 'config.json'}: found no vocab_size; expected a language model's configuration. "
            "Name a decoder-only or encoder-decoder language model."
        )
    return ModelFacts(
        model_type=str(config["model_type"]),
        encoder_decoder=encoder_decoder,
        quantised=quantised,
        vocab_size=vocab_size,
        max_positions=max_positions,
        weight_bytes=sum(file.stat().st_size for file in weights),
        num_weights=sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        files=(folder / "config.json", *weights),
        ignored_code=ignored_code,
    )


def _names_start(folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether a folder says which token a decoder behind an encoder starts with."""
    path = folder / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError, OSError):
        generation = {}
    owners = [owner for owner in (config, generation) if isinstance(owner, dict)]
    return any(type(owner.get("decoder_start_token_id")) is int for owner in owners)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / ADAPTER_CONFIG).is_file()
        raise RecipeError(
            f"{folder}: found {'an adapter' if adapter else 'no config.json'}; expected a model folder. "
            + ("Merge it first with `keeptune export`." if adapter else "Name the folder that holds config.json.")
        )
    try:
        with storage_errors(path):
            config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"{path}: found broken JSON ({error}); expected a model configuration. Fetch it again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise RecipeError(f"{path}: found no model_type; expected a model configuration. Fetch the model again.")
    require_flat(path, config)
    return config


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the files that transformers will read weights from, and refuse a folder that leaves them in doubt."""
    whole, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if (named := config.get("transformers_weights")) not in (None, WEIGHTS):
        raise RecipeError(
            f"{folder / 'config.json'}: found transformers_weights, which names {named!r}; expected weights in "
            f"{WEIGHTS} or in the files of its index. Remove this key, and give the weights their usual name."
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise RecipeError(
            f"{folder}: found {ADAPTER_CONFIG} beside config.json; expected a model or an adapter, because "
            "transformers would read both. Remove one of them, or merge the adapter first with `keeptune export`."
        )
    names = _indexed_files(index) if index.is_file() else []
    if whole.is_file() and (others := sorted(set(names) - {WEIGHTS})):
        raise RecipeError(
            f"{folder}: found {WEIGHTS} and an index that names other files, such as {others[0]!r}; expected one of "
            f"them, because transformers reads the first and leaves the others. Remove {WEIGHTS}, or {index.name}."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise RecipeError(
            f"{folder}: found no {missing[0]!r} ({len(missing)} of {len(names)} weight files are missing); "
            f"expected every file of {index.name}. Fetch the model again."
        )
    if names or whole.is_file():
        return [folder / name for name in names or [WEIGHTS]]
    _refuse_pickles(
        [path.name for path in folder.iterdir()], where=str(folder), encoder_decoder=is_encoder_decoder(config)
    )
    raise RecipeError(f"{folder}: found no weights; expected {WEIGHTS}. Fetch the model again.")


def _indexed_files(index: Path) -> list[str]:
    """Return the names that an index gives to the files of its folder, in order."""
    try:
        with storage_errors(index):
            content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        # transformers needs both.
        broken = not names or not isinstance(content["metadata"], dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        names, broken = [], True
    if broken:
        raise RecipeError(
            f"{index}: found a broken index; expected a weight_map and its metadata. Fetch the model again."
        )
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise RecipeError(
                f"{index}: found the weight file {name!r}; expected the name of a safetensors file in the same folder. "
                "Fetch the model again from where you trust it."
            )
    return names


def _refuse_pickles(names: Sequence[str], *, where: str, encoder_decoder: bool) -> None:
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if not pickles:
        return
    kind = "Seq2SeqLM" if encoder_decoder else "CausalLM"
    out = f"{Path(where).name}-safetensors"
    raise RecipeError(
        f"{where}: found pickled weights {pickles[0]!r} and no model.safetensors; expected safetensors, because "
        'opening a pickle can run code. Convert it where you trust it: python -c "from transformers import '
        f"AutoModelFor{kind} as M, AutoTokenizer as T; M.from_pretrained('{where}').save_pretrained('{out}'); "
        f"T.from_pretrained('{where}').save_pretrained('{out}')\"."
    )


def _refuse_undeclared(
    folder: Path, tensors: Mapping[str, Mapping[str, Any]], *, quantised: Quantization | Literal[False]
) -> None:
    """Refuse weights that are quantised, or are not, where the configuration says otherwise."""
    matrices = {n: t["dtype"] for n, t in tensors.items() if n.endswith("weight") and len(t["shape"]) > 1}
    integers = {name: dtype for name, dtype in matrices.items() if dtype not in _FLOATS}
    if integers and not quantised:
        name, dtype = next(iter(integers.items()))
        raise RecipeError(
            f"{folder}: found weights stored as {dtype}, the first is {name!r}, and a config.json that does not say "
            "how they were quantised; expected F32, F16 or BF16. Name the model that this one was made from."
        )
    if quantised and matrices and not integers:
        raise RecipeError(
            f"{folder}: found a config.json that says bitsandbytes stored the weights in {quantised}, and weight files "
            "that are not quantised; expected both to agree. Remove quantization_config from config.json, and set "
            f"quantization={quantised}."
        )


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Return a file's tensors by name: their `dtype` and `shape`.

    Raises:
        RecipeError: header and size of the file disagree, as a broken download leaves it.
    """
    size = path.stat().st_size
    try:
        with storage_errors(path), path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        places = sorted(tensor["data_offsets"] for tensor in header.values())
        found = {name: {"dtype": str(t["dtype"]), "shape": [int(n) for n in t["shape"]]} for name, t in header.items()}
        expected = 8 + header_bytes + max((end for _, end in places), default=0)
        if size != expected or not places:
            raise ValueError(f"{size} bytes where its header describes {expected}")
        if any(start != before for (start, _), (_, before) in zip(places, [[0, 0], *places[:-1]], strict=True)):
            raise ValueError("its tensors overlap, or leave gaps between them")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RecipeError(
            f"{path}: found a damaged safetensors file ({error}); expected whole weights. Fetch the model again."
        ) from error
    return found
