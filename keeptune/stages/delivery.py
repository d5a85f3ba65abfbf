"""The end of a run: what the run folder holds arrives, the report or a merged model folder leaves."""

from __future__ import annotations

from pathlib import Path

from keeptune.errors import RecipeError
from keeptune.stages.certified import refuse_changed
from keeptune.stages.intact import refuse_changed_files
from keeptune.stages.run import CARD, Run, is_run
from keeptune.storage import read_record, require_unchanged


def report(run: Run) -> Path:
    """Write `report.html` and `report.json` from what the run folder holds; return the page's path.

    Raises:
        DataError: the instruct model is no longer the one that the certificate names.
        StorageError: files of the run have changed since they were written.
    """
    from keeptune.report.page import write_report

    refuse_changed_files(run.folder)
    return write_report(run.folder)


def export(adapter: Path, *, merged: Path, base: str | None) -> Path:
    """Fold an adapter into its base model, in a new folder that transformers loads alone, with the run's model card.

    Raises:
        RecipeError: there is no adapter, the output folder exists, or the base model is quantised.
        DataError: a certificate of the run that the adapter lies in names other files.
        StorageError: the adapter, or its base, is not as its manifest says.
    """
    folder = next((p for p in (adapter, adapter / "adapter") if (p / "adapter_config.json").is_file()), None)
    if folder is None:
        raise RecipeError(
            f"{adapter}: found no adapter_config.json; expected an adapter folder or a method's folder that holds one. "
            "A fully fine-tuned model needs no merging: its model/ folder is whole."
        )
    refuse_changed(folder, runs=[parent for parent in folder.resolve().parents if is_run(parent)])
    require_unchanged(folder)
    from keeptune.model.folder import adapter_base, resolve_model

    named = base or adapter_base(folder)
    from keeptune.model.card import card_from_json
    from keeptune.model.memory import memory_errors
    from keeptune.model.merge import merge_adapter

    described = next((p for p in (folder / CARD, folder.parent / CARD) if p.is_file()), None)
    card = card_from_json(read_record(described)) if described else None
    with memory_errors(f"{folder}: found too little memory; expected room for the base model twice. Close programs."):
        merge_adapter(folder, base=resolve_model(named), out=merged, card=card)
    return merged
