"""Few-shot baselines from recipe to report: the base answers the test records behind solved examples of train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from keeptune import stages
from keeptune.errors import Interrupted
from keeptune.evaluation.evaluate import Exemplars, read_answers
from keeptune.evaluation.metrics import measure
from keeptune.evaluation.scores import paired_differences, score_answers
from keeptune.stages.data import evaluation_split
from keeptune.stages.shots import ShotRow, _fewer, split_behind  # pyright: ignore[reportPrivateUsage]
from keeptune.storage import read_json, verify_folder
from tests.stages import world

torch.set_num_threads(1)
# PEFT itself asks transformers for a deprecated property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS = {
    "base/1-shot-draw-1": "base, 1 shot, draw 1",
    "base/3-shot-draw-1": "base, 3 shots, draw 1",
    "base/3-shot-nearest": "base, 3 nearest shots",
}
SHOTS = {"evaluation.baselines": ["zero-shot", "few-shot", "nearest"], "evaluation.num_shots": [1, 3]}
SHOTS |= {"evaluation.num_draws": 1}


Before = tuple[Path, Path, dict[str, int]]


def finished(path: Path, **overrides: Any) -> tuple[Path, list[str]]:
    """Train, evaluate and report; return the run folder and what was said."""
    notes = world.Notes()
    with stages.open_run(world.recipe(path, **overrides), context=world.context(notes=notes)) as run:
        stages.train(run)
        stages.evaluate(run)
        stages.report(run)
    return run.folder, notes.lines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained_test(run: Path) -> list[str]:
    """Return the ids of the test records whose tasks are trained on."""
    return [record["id"] for record in lines(run / "data/test.jsonl") if record["task"] != "other"]


def recipe_of_two_tasks(folder: Path, *, model: Path) -> Path:
    """Write a recipe with two tasks to train on and one that is scored only."""
    methods = {"lora": {"peft_type": "LORA", "learning_rate": 1e-2}}
    training = {"num_train_epochs": 1, "tokens_per_step": 256, "tokens_per_micro_batch": 256}
    path = world.recipe_file(folder, model=model, data=folder, methods=methods, training=training)
    value = json.loads(path.read_text())
    names = {"one": 0, "two": 1, "other": 2}
    tasks = [{"path": str(world.records(folder / f"{n}.jsonl", number=30, seed=i))} for n, i in names.items()]
    value["data"]["tasks"] = [*tasks[:2], {**tasks[2], "train": False, "max_records": 8}]
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    """A finished run with zero-shot answers alone, and when each of its files was written."""
    folder = tmp_path_factory.mktemp("shots")
    path = recipe_of_two_tasks(folder, model=world.llama(folder / "base"))
    run, _ = finished(path)
    scored = [run / name / "samples.jsonl" for name in ("base/zero-shot", "lora/test")]
    return path, run, {str(file): file.stat().st_mtime_ns for file in scored}


@pytest.fixture(scope="module")
def done(before: Before) -> tuple[Path, Path]:
    """The same run, asked for few-shot answers afterwards."""
    path, run, _ = before
    finished(path, **SHOTS)
    return path, run


def test_asking_for_few_shot_answers_later_runs_nothing_else_again(before: Before, done: tuple[Path, Path]) -> None:
    assert {file: Path(file).stat().st_mtime_ns for file in before[2]} == before[2]
    openings = [opening["models"] for opening in lines(done[1] / "test_openings.jsonl")]
    assert openings == [["base", "lora"], ["base, again"], list(ROWS.values())]
    written = {folder: (done[1] / folder / "samples.jsonl").stat().st_mtime_ns for folder in ROWS}
    _, said = finished(done[0], **SHOTS)
    assert any(line.endswith("evaluated before and unchanged") for line in said)
    assert {folder: (done[1] / folder / "samples.jsonl").stat().st_mtime_ns for folder in ROWS} == written


def test_exemplars_are_train_records_of_the_same_task(done: tuple[Path, Path]) -> None:
    task_of = {record["id"]: record["task"] for record in lines(done[1] / "data/train.jsonl")}
    for folder in ROWS:
        for sample in lines(done[1] / folder / "samples.jsonl"):
            assert len(sample["exemplars"]) == int(folder[5])
            assert {task_of[id_] for id_ in sample["exemplars"]} == {sample["task"]}


def test_a_draw_shows_every_record_of_a_task_the_same_and_the_nearest_to_each_its_own(done: tuple[Path, Path]) -> None:
    for folder in ROWS:
        header, samples = read_json(done[1] / folder / "scores.json"), lines(done[1] / folder / "samples.jsonl")
        shown = {(sample["task"], *sample["exemplars"]) for sample in samples}
        if folder.endswith("nearest"):
            assert header["exemplars"] == {"draw": "nearest", "ids": {}}
            assert len(shown) > 2
        else:
            assert header["exemplars"]["draw"] == 1
            assert shown == {(task, *ids) for task, ids in header["exemplars"]["ids"].items()}
            assert len(shown) == 2


def test_only_records_of_trained_tasks_are_answered_and_each_says_with_how_many_tokens(done: tuple[Path, Path]) -> None:
    trained = trained_test(done[1])
    zero = read_json(done[1] / "base/zero-shot/scores.json")
    assert len(trained) < zero["num_records"] == len(lines(done[1] / "data/test.jsonl"))
    means = [zero["prompt_tokens_mean"]]
    for folder, row in ROWS.items():
        header = read_json(done[1] / folder / "scores.json")
        assert [sample["id"] for sample in lines(done[1] / folder / "samples.jsonl")] == trained
        assert (header["model"], header["row"], header["shots"]) == ("base", row, int(folder[5]))
        assert {score["task"] for score in header["scores"]} == {"one", "two", "all"}
        assert (header["num_fitted"], header["num_without_exemplars"], header["num_refused"]) == (0, 0, 0)
        assert header["num_shown_mean"] == header["shots"]
        means.append(header["prompt_tokens_mean"])
        assert abs(header["own_prompt_tokens_mean"] - zero["prompt_tokens_mean"]) < 3
    assert means[0] < means[1] < means[2]


def test_few_shot_answers_are_decoded_and_scored_as_all_others(done: tuple[Path, Path]) -> None:
    zero = read_json(done[1] / "base/zero-shot/scores.json")
    tuned = read_json(done[1] / "lora/test/scores.json")
    for folder in ROWS:
        header, answers = read_json(done[1] / folder / "scores.json"), read_answers(done[1] / folder)
        assert header["metrics"] == zero["metrics"] == tuned["metrics"]
        assert header["decoding"] == zero["decoding"] == tuned["decoding"]
        for answer in answers:
            loss = answer.metrics["loss"]
            assert (
                measure(answer.prediction, answer.references, loss=loss, names=list(answer.metrics)) == answer.metrics
            )
        means = {
            (score.task, score.metric): score.mean for score in score_answers(answers, metrics=list(zero["metrics"]))
        }
        assert {(score["task"], score["metric"]): score["mean"] for score in header["scores"]} == means
        assert verify_folder(done[1] / folder) is not None


def test_a_method_is_paired_with_a_few_shot_row_on_the_records_that_both_answered(done: tuple[Path, Path]) -> None:
    paired = read_json(done[1] / "paired.json")["paired"]
    assert {(p["model"], p["against"]) for p in paired} == {("lora", name) for name in ("base", *ROWS.values())}
    assert {p["task"] for p in paired if p["against"] == "base"} == {"one", "two", "other", "all", "others"}
    tuned = [answer for answer in read_answers(done[1] / "lora/test") if answer.task != "other"]
    for folder, row in ROWS.items():
        found = [p for p in paired if p["against"] == row]
        assert {p["task"] for p in found} == {"one", "two", "all"}
        theirs = read_answers(done[1] / folder)
        assert [answer.id for answer in tuned] == [answer.id for answer in theirs]
        (expected,) = [
            p for p in paired_differences(tuned, theirs, metrics=["loss"], model="lora", against=row) if p.task == "all"
        ]
        (loss,) = [p for p in found if (p["task"], p["metric"]) == ("all", "loss")]
        assert (loss["difference"], loss["low"]) == (expected.difference, expected.low)


def test_an_encoder_decoder_answers_behind_examples_too(tmp_path: Path) -> None:
    path = recipe_of_two_tasks(tmp_path, model=world.t5(tmp_path / "base"))
    run, _ = finished(path, **SHOTS | {"evaluation.num_shots": [3]})
    header = read_json(run / "base/3-shot-draw-1/scores.json")
    assert (header["num_shown_mean"], header["num_fitted"]) == (3.0, 0)
    assert header["prompt_tokens_mean"] > 3 * header["own_prompt_tokens_mean"]
    assert len(read_answers(run / "base/3-shot-nearest")) == header["num_records"]


def moved(before: Before, folder: Path, **evaluation: Any) -> tuple[Path, list[str]]:
    """Evaluate in a copy of the run without few-shot answers, with other settings and without generation."""
    path, run, _ = before
    if not (folder / "run").exists():
        shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("*-shot-*"))
    settings = {"metrics": ["loss"], "num_draws": 1, "baselines": ["zero-shot", "few-shot"], **evaluation}
    overrides = {f"evaluation.{name}": value for name, value in settings.items()}
    recipe, notes = world.recipe(path, output_dir=str(folder / "run"), **overrides), world.Notes()
    with stages.open_run(recipe, context=world.context(notes=notes)) as opened:
        stages.evaluate(opened)
    return opened.folder, notes.lines


def test_more_draws_show_other_examples(before: Before, tmp_path: Path) -> None:
    run, _ = moved(before, tmp_path, num_shots=[2], num_draws=3)
    headers = [read_json(run / f"base/2-shot-draw-{draw}/scores.json") for draw in (1, 2, 3)]
    assert len({tuple(header["exemplars"]["ids"]["one"]) for header in headers}) == 3
    assert len({header["prompt_sha256"] for header in headers}) == 3


def test_what_does_not_fit_is_counted_said_and_kept_in_the_scores(before: Before, tmp_path: Path) -> None:
    # Of 512 positions, an answer leaves room for about three examples and the question.
    run, said = moved(before, tmp_path, num_shots=[8], max_new_tokens=380)
    header, samples = read_json(run / "base/8-shot-draw-1/scores.json"), lines(run / "base/8-shot-draw-1/samples.jsonl")
    numbers = [len(sample["exemplars"]) for sample in samples]
    assert len(set(numbers)) > 1 and header["num_fitted"] == sum(number < 8 for number in numbers) == len(samples)
    assert header["num_shown_mean"] == pytest.approx(sum(numbers) / len(numbers))
    for sample in samples:
        ids = header["exemplars"]["ids"][sample["task"]]
        assert 0 < len(sample["exemplars"]) < 8
        assert sample["exemplars"] == ids[len(ids) - len(sample["exemplars"]) :]
    (line,) = [line for line in said if "show fewer" in line]
    assert line == (
        f"base, 8 shots, draw 1: {len(samples)} of {len(samples)} records show fewer than 8 examples, as many as there "
        f"are or have room (mean {header['num_shown_mean']:.2f}); 0 show none"
    )


def test_of_one_example_the_records_that_show_fewer_show_none() -> None:
    exemplars = Exemplars("base, 1 shot, draw 1", 1, {}, {}, 13, 13, 0, 0.24, 20.0)
    said = "13 of 17 records show no example, as there is none or no room for it"
    assert _fewer(exemplars, num_records=17, num_shots=1) == said


def test_a_row_without_room_for_any_example_is_left_out_and_named_once(before: Before, tmp_path: Path) -> None:
    settings = {"num_shots": [1], "max_new_tokens": 470}
    run, said = moved(before, tmp_path, **settings)
    header, number = read_json(run / "base/1-shot-draw-1/scores.json"), len(trained_test(run))
    (line,) = [line for line in said if "no solved example fits" in line]
    assert line == header["left_out"]
    assert line == (
        f"base, 1 shot, draw 1: no solved example fits before any of the {number} test prompts. The model has 512 "
        "positions, and 470 of them are kept for the answer. Lower evaluation.max_new_tokens, or remove few-shot from "
        "evaluation.baselines."
    )
    assert not (run / "base/1-shot-draw-1/samples.jsonl").exists()
    assert {p["against"] for p in read_json(run / "paired.json")["paired"]} == {"base"}
    openings = (run / "test_openings.jsonl").read_text()
    moved(before, tmp_path, **settings)
    assert (run / "test_openings.jsonl").read_text() == openings


def test_a_template_that_refuses_earlier_turns_leaves_the_row_out(tmp_path: Path) -> None:
    path = recipe_of_two_tasks(tmp_path, model=world.llama(tmp_path / "base"))
    tokenizer = tmp_path / "base/tokenizer_config.json"
    source = (
        "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.write_text(json.dumps({**read_json(tokenizer), "chat_template": source}))
    with stages.open_run(world.recipe(path), context=world.context()) as run:
        data = stages.prepare(run)
        split, train = evaluation_split(data, "test"), data.records("train")
        _, exemplars, left_out = split_behind(ShotRow(1, "nearest"), run=run, data=data, split=split, train=train)
        _, _, without_train = split_behind(ShotRow(1, 1), run=run, data=data, split=split, train=[])
    assert left_out.startswith(
        "base, 1 nearest shot: the template refuses solved examples before a prompt (chat template: found "
        "TemplateError (one turn only) for a conversation of the roles user, assistant, user; expected rendered text."
    )
    assert left_out.endswith(
        "Remove nearest from evaluation.baselines, or choose another data.template in another output_dir."
    )
    assert exemplars.num_refused == exemplars.num_without_exemplars == len(trained_test(tmp_path / "run"))
    assert without_train == (
        "base, 1 shot, draw 1: the tasks in test have no train record to show as an example. Give these tasks train "
        "records."
    )


def test_a_stop_between_rows_keeps_the_finished_ones(before: Before, tmp_path: Path) -> None:
    path, run, _ = before
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/base")
    moved = json.loads(path.read_text()) | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(moved))
    recipe = world.recipe(tmp_path / "recipe.yaml", **SHOTS)
    folders = [tmp_path / "run" / folder for folder in ROWS]
    context = world.context(stop_requested=lambda: (folders[0] / "manifest.json").exists())
    with pytest.raises(Interrupted), stages.open_run(recipe, context=context) as opened:
        stages.evaluate(opened)
    assert [folder.exists() for folder in folders] == [True, False, False]
    with stages.open_run(recipe, context=world.context()) as opened:
        stages.evaluate(opened)
    for folder, name in zip(folders, ROWS, strict=True):
        if (run / name / "samples.jsonl").exists():
            assert (folder / "samples.jsonl").read_text() == (run / name / "samples.jsonl").read_text()
