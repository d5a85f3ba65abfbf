"""Arguments arrive, one stage is called, and its outcome leaves as lines and an exit code."""

from __future__ import annotations

import os
import sys
import time
from logging import ERROR, getLogger
from pathlib import Path
from typing import Annotated

import typer

from keeptune import __version__
from keeptune.invocation import (
    Output,
    command_line,
    count_of,
    end_with_driver,
    load,
    load_with_ranges,
    make_console,
    make_context,
    next_steps,
    open_recipe,
    report_fault,
    trial_launcher,
)

app = typer.Typer(
    name="keeptune",
    help="Fine-tune, and keep what you had: from instruction data to an instruct model with its evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe: what to train, on what, how.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a field of the recipe, e.g. training.num_train_epochs=1."
    ),
]
LabFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the lab stands.", show_default=True)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print outcomes only.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def check(
    recipe: RecipePath,
    *,
    set_: Overrides = None,
    records: Annotated[
        int, typer.Option(min=1, metavar="NUMBER", help="Records to show, one of each task in turn.")
    ] = 3,
    quiet: Quiet = False,
) -> None:
    """Audit and render the data; train nothing, keep nothing. Shows what would be trained on."""
    from keeptune import stages, terminal_check

    loaded, ranges = load_with_ranges(recipe, set_)
    with stages.naming_recipe(recipe, loaded):
        stages.check_methods(loaded)
        outcome = stages.check(loaded, context=make_context(quiet=quiet, signals=False), num_shown=records)
    if not quiet:
        terminal_check.show_check(make_console(), outcome)
    splits = ", ".join(f"{count:,} {split}" for split, count in outcome.audit["splits"].items())
    print(f"Checked: {outcome.audit['rows_in']:,} rows, {outcome.audit['kept']:,} records kept ({splits})")
    with stages.naming_recipe(recipe, loaded):
        stages.refuse_budgets(outcome.budgets)
    if not quiet:
        overrides = [part for override in set_ or [] for part in ("--set", override)]
        if ranges:
            print(f"Ranges, here with the largest value of each: {', '.join(ranges)}")
        print(f"Ready. Next: {command_line('search' if ranges else 'run', str(recipe), *overrides)}")


@app.command()
def plan(recipe: RecipePath, *, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Say what memory and time each method would take. Nothing is trained or kept."""
    from keeptune import stages, terminal_plan

    # Of a range the largest value, which takes the most memory or time.
    loaded, _ = load_with_ranges(recipe, set_)
    with stages.naming_recipe(recipe, loaded):
        stages.check_methods(loaded)
        outcome = stages.plan(loaded, context=make_context(quiet=quiet, signals=False))
    if quiet:
        print("\n".join(terminal_plan.plan_lines(outcome)))
    else:
        terminal_plan.show_plan(make_console(), outcome)


@app.command()
def prepare(recipe: RecipePath, *, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Read, audit, split and tokenise the data."""
    from keeptune import stages, terminal

    with open_recipe(recipe, set_, quiet=quiet, check=stages.check_model) as run:
        prepared = stages.prepare(run)
        if not quiet:
            terminal.show_audit(make_console(), prepared.audit)
        stages.check_budgets(run, prepared)
        print(f"Data: {run.folder / 'data'}")


@app.command()
def train(
    recipe: RecipePath,
    *,
    set_: Overrides = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Train this method only; may be given again.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train every method of the recipe, choosing on validation."""
    from keeptune import stages

    with open_recipe(recipe, set_, quiet=quiet, check=stages.check_methods) as run:
        prepared = stages.prepare(run)
        stages.check_budgets(run, prepared)
        stages.check_budgets(run, prepared, harness=stages.write_harness(run, prepared))
        texts = stages.write_texts(run, prepared, for_training=True)
        kept = stages.keep_texts(run.recipe, prepared, texts)
        for folder in stages.train(run, data=prepared, methods=method, texts=kept):
            print(f"Trained: {folder}")


@app.command()
def evaluate(recipe: RecipePath, *, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Score the base model and every method on the test split. Delivers the method that validation selected."""
    from keeptune import stages

    with open_recipe(recipe, set_, quiet=quiet, begun=True) as run:
        delivered = stages.evaluate(run)
        print(
            f"Instruct model: {delivered}" if delivered else "Evaluated; `keeptune certify` chooses within the budget"
        )


@app.command()
def certify(
    recipe: RecipePath,
    *,
    artifact: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Certify this model or adapter folder, and deliver nothing.")
    ] = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Deliver the best model that loses no more than the budget."""
    from keeptune import stages, terminal

    with open_recipe(recipe, set_, quiet=quiet, begun=True) as run:
        if artifact is not None:
            print("\n".join(("", *stages.certify_artifact(run, artifact).lines)))
            return
        certificate = stages.certify(run)
        page = stages.report(run) if (run.folder / "report.html").is_file() else None
    terminal.show_certificate(make_console(), certificate)
    if page is not None:
        print(f"Report: {page}")


@app.command()
def report(recipe: RecipePath, *, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Write report.html and report.json from a run folder."""
    from keeptune import stages

    with open_recipe(recipe, set_, quiet=quiet, begun=True) as run:
        print(f"Report: {stages.report(run)}")


@app.command()
def run(recipe: RecipePath, *, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Prepare, train, evaluate, certify and report. Finished stages are not run again."""
    from keeptune import stages, terminal

    with open_recipe(recipe, set_, quiet=quiet, check=stages.check_methods) as opened:
        prepared = stages.prepare(opened)
        if not quiet and not prepared.made_before:
            terminal.show_audit(make_console(), prepared.audit)
        stages.check_budgets(opened, prepared)
        harness = stages.write_harness(opened, prepared)
        stages.check_budgets(opened, prepared, harness=harness)
        texts = stages.write_texts(opened, prepared, for_training=True)
        kept = stages.keep_texts(opened.recipe, prepared, texts)
        stages.train(opened, data=prepared, texts=kept)
        delivered = stages.evaluate(opened, data=prepared, harness=harness)
        certificate = stages.certify(opened, data=prepared) if delivered is None else None
        page = stages.report(opened)
    terminal.show_scores(make_console(), page.with_name("report.json"))
    if certificate:
        terminal.show_certificate(make_console(), certificate)
    else:
        print(f"Instruct model: {delivered}")
    print(f"Report: {page}")
    if not quiet:
        print("\n".join(["Next:", *next_steps(page.parent)]))


@app.command()
def search(
    recipe: RecipePath,
    *,
    trials: Annotated[
        int, typer.Option(parser=count_of("--trials"), metavar="NUMBER", help="Settings to try of each method.")
    ] = 12,
    jobs: Annotated[int, typer.Option(parser=count_of("--jobs"), metavar="NUMBER", help="Trials at a time.")] = 1,
    halving: Annotated[
        bool, typer.Option("--halving", help="Try all on a ninth of the train records, the better third on more.")
    ] = False,
    against_drift: Annotated[
        bool, typer.Option("--against-drift", help="Look for little drift from the base too, not for the value alone.")
    ] = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Find settings on validation; test stays closed. The two best of each method are tried with two more seeds."""
    from keeptune import stages, terminal_search

    written = stages.search(
        recipe,
        overrides=set_ or [],
        num_trials=trials,
        num_jobs=jobs,
        halving=halving,
        against_drift=against_drift,
        context=make_context(quiet=quiet),
        launch=trial_launcher(num_jobs=jobs),
    )
    terminal_search.show_search(make_console(), written)
    best = written.with_name("best.yaml")
    print(f"Report: {written.with_name('report.html')}")
    print(f"Best: {best}. Next: {command_line('run', str(best))}")


@app.command()
def curve(
    recipe: RecipePath,
    *,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N,N", help="Three or more numbers of train records; default: from an eighth to all."),
    ] = None,
    jobs: Annotated[int, typer.Option(parser=count_of("--jobs"), metavar="NUMBER", help="Trainings at a time.")] = 1,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Say what more records would bring. Trains on more and more of them, three seeds each, scored on validation."""
    from keeptune import stages, terminal_search

    written = stages.curve(
        recipe,
        overrides=set_ or [],
        sizes=sizes,
        num_jobs=jobs,
        context=make_context(quiet=quiet),
        launch=trial_launcher(num_jobs=jobs),
    )
    terminal_search.show_growth(make_console(), written)
    print(f"Report: {written.with_name('report.html')}")


@app.command(hidden=True)
def trial(recipe: RecipePath, parts: Path, subset: str) -> None:
    """Make one trial of a search; its driver gives this command."""
    end_with_driver()
    from keeptune import stages

    with open_recipe(recipe, None, quiet=True) as run:
        stages.run_trial(run, parts, subset=subset)


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Run folders, methods' folders in them (runs/x/lora), model or adapter folders, hub ids.",
        ),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the comparison goes; default: the first run's folder.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Set models side by side on one test set."""
    from keeptune import stages, terminal

    written = stages.compare(models, out=out, context=make_context(quiet=quiet))
    terminal.show_comparison(make_console(), written)
    print(f"Comparison: {written.with_suffix('.md')}")


@app.command()
def lab(folder: LabFolder = Path("lab"), *, quiet: Quiet = False) -> None:
    """Write the lab: base models, tasks with known answers, recipes."""
    from keeptune.lab.folder import RECIPES

    _write_lab(folder, quiet=quiet)
    for name in RECIPES:
        print(f"  {command_line('run', f'{folder / name}.yaml')}")


@app.command()
def demo(folder: LabFolder = Path("lab"), *, quiet: Quiet = False) -> None:
    """Tune a small model and report what it learned and forgot. It is the lab's, tuned in full and by LoRA."""
    from keeptune.terminal_change import first_line, show_change

    begun = time.monotonic()
    _write_lab(folder, quiet=quiet)
    path = folder / "lab-demo.yaml"
    recipe = load(path, None)
    if not quiet:
        print(first_line(recipe), flush=True)
    run(path, quiet=quiet)
    page = Path(recipe.output_dir, "report.html").resolve()
    show_change(make_console(), page.with_name("report.json"))
    print(f"The demo took {time.monotonic() - begun:,.0f} s.")
    print(f"Open it in a browser: {page.as_uri()}")


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A method's folder (runs/x/lora) or an adapter folder.")
    ],
    merged: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the merged model goes; must not exist.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, where the adapter does not name it.")
    ] = None,
) -> None:
    """Fold an adapter into its base model. Writes a model folder that transformers loads alone."""
    from keeptune import stages

    print(f"Merged model: {stages.export(adapter, merged=merged, base=base)}")


def _write_lab(folder: Path, *, quiet: bool) -> None:
    from keeptune.lab.folder import CONTENT, write_lab

    written = write_lab(folder, progress=make_context(quiet=quiet, signals=False).progress)
    kept = [name for name in CONTENT if name not in written]
    parts = [f"{verb} {', '.join(names)}" for verb, names in (("wrote", written), ("kept", kept)) if names]
    print(f"Lab: {folder} ({'; '.join(parts)})")


def main() -> None:
    """Run one command; a fault of the user's is one message and its exit code, a fault of ours a traceback."""
    # The hub's client reports its use unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # oneDNN, which multiplies bf16, keeps a kernel for every size of pack, and hardly ever meets a size again: its
    # default of 1,024 took 0.6 GB where 32 were as fast (LOG.md).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    # OpenMP's threads spin while they wait for each other: with any other work on the machine's cores, a step took 20
    # times as long (LOG.md). Read when torch loads it, hence before any import of it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PEFT imports bitsandbytes where that is installed, which tells at once of a kernel that it can do without.
    getLogger("bitsandbytes").setLevel(ERROR)
    output = Output()
    try:
        # typer returns the code of an exit of its own, 130 after Ctrl-C among them.
        returned = app(standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:
        code = 1
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            code = report_fault(error)
        else:
            show()
            code = 2
    sys.exit(output.end(code))


if __name__ == "__main__":
    main()
