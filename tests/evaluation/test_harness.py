"""The door to lm-evaluation-harness: its tasks' documents, and answers that equal its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from keeptune.errors import DataError, Interrupted, RecipeError
from keeptune.evaluation.evaluate import Bench
from keeptune.evaluation.generate import Decoding
from keeptune.evaluation.harness import HarnessSuite, ask, load_suites, suite_documents
from keeptune.evaluation.scores import score_of
from keeptune.model.load import load_model, load_tokenizer
from keeptune.model.methods import quiet_peft
from keeptune.progress import Silent
from tests.evaluation.harness_tasks import colours, task, writing
from tests.stages.world import llama, t5

REASON = "lm-evaluation-harness is an extra (keeptune[harness])"
lm_eval = pytest.importorskip("lm_eval", reason=REASON)
tasks = pytest.importorskip("lm_eval.tasks", reason=REASON)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the index of the harness's own tasks, which takes 20 s to read."""
    real = tasks.TaskManager
    monkeypatch.setattr(
        tasks,
        "TaskManager",
        lambda include_path=None, include_defaults=False: real(include_path=include_path, include_defaults=False),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("base"))


def bench(*, encoder_decoder: bool = False, stopped: bool = False, tokens_per_batch: int = 2048) -> Bench:
    decoding = Decoding(
        max_new_tokens=8,
        stop_ids=(0,),
        pad_id=0,
        tokens_per_batch=tokens_per_batch,
        encoder_decoder=encoder_decoder,
        max_positions=None if encoder_decoder else 512,
    )
    unused: Any = None
    return Bench(unused, decoding, unused, unused, unused, None, Silent(), lambda: stopped)


def asked(folder: Path, suites: list[HarnessSuite], *, chat: bool = False, **options: Any) -> list[Any]:
    documents = [document for suite in suites for document in suite_documents(suite)]
    model, tokenizer = load_model(folder, device=CPU, dtype=torch.float32), load_tokenizer(folder)
    return ask(model, suites, documents, bench=bench(**options), tokenizer=tokenizer, apply_chat_template=chat)


def test_answers_are_the_harness_s_own(tmp_path: Path, base: Path) -> None:
    hflm = pytest.importorskip("lm_eval.models.huggingface").HFLM
    task(tmp_path, "colours")
    suites = load_suites(["colours"], include_path=tmp_path)
    answers = asked(base, suites)
    model = hflm(pretrained=load_model(base, device=CPU, dtype=torch.float32), tokenizer=load_tokenizer(base))
    own = lm_eval.evaluate(model, tasks.TaskManager(include_path=str(tmp_path)).load(["colours"]))
    samples = own["samples"]["colours"]
    assert [answer.metrics for answer in answers] == [{"acc": sample["acc"]} for sample in samples]
    assert sum(answer.metrics["acc"] for answer in answers) / 12 == own["results"]["colours"]["acc,none"]


def test_the_choice_is_that_of_the_highest_likelihood(tmp_path: Path, base: Path) -> None:
    rows = colours(3)
    task(tmp_path, "colours", rows=rows)
    model, tokenizer = load_model(base, device=CPU, dtype=torch.float32), load_tokenizer(base)
    for row, answer in zip(rows, asked(base, load_suites(["colours"], include_path=tmp_path)), strict=True):
        prompt, values = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"], []
        choices: Any = row["choices"]
        for choice in choices:
            ids = torch.tensor([[*prompt, *tokenizer(f" {choice}")["input_ids"]]])
            logs = model(ids).logits[0, :-1].log_softmax(-1)
            values.append(sum(logs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])))
        best = choices[values.index(max(values))]
        assert answer.prediction == best
        assert answer.metrics["acc"] == float(best == choices[row["label"]])
        assert answer.references == (choices[row["label"]],)


def test_solved_examples_are_the_same_for_every_model_that_is_asked(tmp_path: Path, base: Path) -> None:
    suites = load_suites(["words"], include_path=writing(tmp_path, "words"))
    first, second = asked(base, suites), asked(base, suites)
    assert [answer.prompt for answer in first] == [answer.prompt for answer in second]
    assert all(answer.prompt.count("Answer:") == 3 for answer in first)
    assert first == second


def test_the_chat_template_is_put_around_prompts_where_that_is_asked_for(tmp_path: Path, base: Path) -> None:
    suites = load_suites(["colours"], include_path=task(tmp_path, "colours"))
    plain, chat = asked(base, suites)[0], asked(base, suites, chat=True)[0]
    assert "<|im_start|>" not in plain.prompt
    assert chat.prompt.startswith("<|im_start|>user\nQuestion: ")
    assert chat.prompt.endswith("Answer:<|im_end|>\n<|im_start|>assistant\n")


def test_answers_do_not_depend_on_the_batches_nor_on_the_order_in_which_they_are_wanted(
    tmp_path: Path, base: Path
) -> None:
    suites = load_suites(["colours"], include_path=task(tmp_path, "colours"))
    documents = suite_documents(suites[0])
    model, tokenizer = load_model(base, device=CPU, dtype=torch.float32), load_tokenizer(base)
    wanted = [documents[i] for i in (7, 2, 9)]
    found = ask(model, suites, wanted, bench=bench(tokens_per_batch=1), tokenizer=tokenizer)
    assert [answer.id for answer in found] == [document.id for document in wanted]
    everything = {answer.id: answer for answer in asked(base, suites)}
    assert found == [everything[document.id] for document in wanted]


def test_a_task_in_two_suites_is_answered_alike_in_both(tmp_path: Path, base: Path) -> None:
    (tmp_path / "all.yaml").write_text(json.dumps({"group": "all", "task": ["colours"]}), encoding="utf-8")
    suites = load_suites(["colours", "all"], include_path=task(tmp_path, "colours"))
    answers = asked(base, suites)
    alone, grouped = ([a for a in answers if a.task == name] for name in ("colours", "all"))
    assert len(alone) == len(grouped) == 12
    assert [(a.prompt, a.metrics) for a in alone] == [(a.prompt, a.metrics) for a in grouped]
    assert alone == [answer for answer in asked(base, suites[:1])]


def test_the_first_metric_that_is_a_mean_over_documents_is_taken(tmp_path: Path) -> None:
    metrics = [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ]
    target = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{choices[label]}}"}
    task(tmp_path, "last-word", metric_list=metrics, **target)
    assert load_suites(["last-word"], include_path=tmp_path)[0].metric == "acc"


def test_a_group_is_one_suite_of_all_its_tasks_documents(tmp_path: Path) -> None:
    task(tmp_path, "one")
    task(tmp_path, "two", rows=colours(5, seed=3))
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["one", "two"]}), encoding="utf-8")
    suite = load_suites(["both"], include_path=tmp_path)[0]
    documents = suite_documents(suite)
    assert {document.suite for document in documents} == {"both"}
    assert [d.task for d in documents].count("one") == 12 and [d.task for d in documents].count("two") == 5


def test_choices_that_are_inputs_make_the_question(tmp_path: Path) -> None:
    rows = [{"inputs": ["the cat sat because the cat", "the cat sat because the mat"], "end": "was tired", "right": 0}]
    where = {"doc_to_text": "{{right}}", "doc_to_choice": "{{inputs}}", "doc_to_target": "{{end}}"}
    task(tmp_path, "which", rows=rows, **where)
    document = suite_documents(load_suites(["which"], include_path=tmp_path)[0])[0]
    assert document.references == ("the cat sat because the cat",)
    assert document.prompt.endswith("was tired") and document.num_choices == 2


def test_an_encoder_decoder_answers_too(tmp_path: Path) -> None:
    folder = t5(tmp_path / "t5")
    task(tmp_path, "colours")
    writing(tmp_path, "words")
    answers = asked(folder, load_suites(["colours", "words"], include_path=tmp_path), encoder_decoder=True)
    assert len(answers) == 24
    assert all(0.0 <= value <= 1.0 for answer in answers for value in answer.metrics.values())


def test_an_adapter_that_adds_nothing_changes_nothing_and_virtual_tokens_are_no_obstacle(
    tmp_path: Path, base: Path
) -> None:
    task(tmp_path, "colours")
    suites = load_suites(["colours", "words"], include_path=writing(tmp_path, "words"))
    documents = [document for suite in suites for document in suite_documents(suite)]
    kinds = (LoraConfig(r=2), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    found = []
    for kind in kinds:
        torch.manual_seed(0)
        with quiet_peft():
            adapted = get_peft_model(load_model(base, device=CPU, dtype=torch.float32), kind)
        found.append(ask(adapted, suites, documents, bench=bench(), tokenizer=load_tokenizer(base)))
    assert found[0] == asked(base, suites)
    assert [answer.id for answer in found[1]] == [answer.id for answer in found[0]]


def test_asking_leaves_the_random_state_and_the_progress_bars_as_they_were(tmp_path: Path, base: Path) -> None:
    from tqdm import tqdm

    state, begin = torch.random.get_rng_state(), tqdm.__init__
    asked(base, load_suites(["colours"], include_path=task(tmp_path, "colours")))
    assert torch.equal(state, torch.random.get_rng_state()) and tqdm.__init__ is begin


def test_asking_stops_where_that_is_asked_for(tmp_path: Path, base: Path) -> None:
    suites = load_suites(["colours"], include_path=task(tmp_path, "colours"))
    with pytest.raises(Interrupted, match="answers to harness tasks: stopped on request"):
        asked(base, suites, stopped=True)


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    task(tmp_path, "colours")
    with pytest.raises(RecipeError, match=r"harness\.tasks: found 'colour'; expected.*Did you mean 'colours'\?"):
        load_suites(["colour"], include_path=tmp_path)
    with pytest.raises(RecipeError, match="found 'zzz'.*Name the folder of its file"):
        load_suites(["zzz"], include_path=tmp_path)


def test_a_folder_of_tasks_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"include_path: found no folder '.*gone'; expected one with task files"):
        load_suites(["colours"], include_path=tmp_path / "gone")


def test_a_task_without_a_metric_of_each_document_is_refused(tmp_path: Path) -> None:
    metrics = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    settings = {"output_type": "loglikelihood_rolling", "doc_to_choice": None, "doc_to_target": "{{question}}"}
    task(tmp_path, "text", metric_list=metrics, **settings)
    with pytest.raises(RecipeError, match="found 'text', whose metrics are word_perplexity; expected one that is a"):
        load_suites(["text"], include_path=tmp_path)


def test_a_group_judged_by_several_metrics_is_a_suite_of_each_task(tmp_path: Path) -> None:
    task(tmp_path, "one")
    writing(tmp_path, "two")
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["one", "two"]}), encoding="utf-8")
    suites = load_suites(["both"], include_path=tmp_path)
    assert [(suite.name, suite.metric, suite.group) for suite in suites] == [
        ("one", "acc", "both"), ("two", "exact_match", "both")
    ]  # fmt: skip


GLUE = {
    "cola": {"sentence": "The cat {} on the mat {}.", "label": 2},
    "mnli": {"premise": "The cat {} there {}.", "hypothesis": "A cat {}.", "label": 3},
    "mrpc": {"sentence1": "The cat {} {}.", "sentence2": "A cat {}.", "label": 2},
    "qnli": {"question": "What {} number {}?", "sentence": "A cat {}.", "label": 2},
    "qqp": {"question1": "Who {} number {}?", "question2": "Which one {}?", "label": 2},
    "rte": {"sentence1": "The cat {} {}.", "sentence2": "A cat {}.", "label": 2},
    "sst2": {"sentence": "A film that {} by {}.", "label": 2},
    "wnli": {"sentence1": "The cat {} {}.", "sentence2": "It {}.", "label": 2},
}


def with_made_documents(folder: Path, pattern: str, fields: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the harness's own task files into a folder, with documents made up for them in the place of the hub's."""
    verbs = ["sits", "sleeps", "runs", "sings", "waits"]
    for name, columns in fields.items():
        own = Path(lm_eval.__file__).parent / "tasks" / pattern.format(name)
        for file in own.parent.glob("*.py"):
            (folder / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
        rows = [
            {
                key: value.format(verbs[i % 5], i) if isinstance(value, str) else i * 7 % value
                for key, value in columns.items()
            }
            for i in range(14)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        kept = [
            line
            for line in own.read_text(encoding="utf-8").splitlines()
            if not line.startswith(("dataset_", "training_split", "validation_split"))
        ]
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data)}}}
        made = [*kept, *(f"{key}: {json.dumps(value)}" for key, value in where.items()), "validation_split: validation"]
        (folder / f"{name}.yaml").write_text("\n".join(made), encoding="utf-8")
    return folder


def test_glue_by_name_is_each_of_its_tasks_by_its_own_metric(tmp_path: Path, base: Path) -> None:
    with_made_documents(tmp_path, "glue/{}/default.yaml", GLUE)
    suites = load_suites(["glue"], include_path=tmp_path)
    assert {suite.name: (suite.metric, *suite.also) for suite in suites} == {
        "cola": ("mcc",), "mnli": ("acc",), "mrpc": ("acc", "binary_f1"), "qnli": ("acc",), "qqp": ("acc", "binary_f1"),
        "rte": ("acc",), "sst2": ("acc",), "wnli": ("acc",),
    }  # fmt: skip
    assert {suite.group for suite in suites} == {"glue"}
    answers = asked(base, suites)
    hflm = pytest.importorskip("lm_eval.models.huggingface").HFLM
    model = hflm(pretrained=load_model(base, device=CPU, dtype=torch.float32), tokenizer=load_tokenizer(base))
    loaded = tasks.TaskManager(include_path=str(tmp_path)).load(["glue"])
    own = lm_eval.evaluate(model, loaded, bootstrap_iters=0)["results"]
    theirs = {"mcc": "mcc,none", "acc": "acc,none", "binary_f1": "f1,none"}
    for suite in suites:
        of_suite = [answer for answer in answers if answer.task == suite.name]
        for metric in (suite.metric, *suite.also):
            expected = own[suite.name][theirs[metric]]
            assert score_of(of_suite, metric=metric) == pytest.approx(expected, abs=1e-9), (suite.name, metric)


def test_super_glue_by_name_is_each_of_its_tasks_too(tmp_path: Path) -> None:
    fields = {
        "boolq": {"passage": "A cat {} {}.", "question": "does it {}", "label": 2},
        "cb": {"premise": "A cat {} {}.", "hypothesis": "It {}.", "label": 3},
        "multirc": {"paragraph": "A cat {} {}.", "question": "Who {}?", "answer": "the cat {}", "label": 2},
    }
    with_made_documents(tmp_path, "super_glue/{}/default.yaml", fields)
    rows = [
        {
            "passage": f"Cat {i} sits here.",
            "query": "Here @placeholder sits.",
            "entities": ["Cat", "Dog"],
            "answers": ["Cat"],
        }
        for i in range(3)
    ]
    own = Path(lm_eval.__file__).parent / "tasks" / "super_glue" / "record"
    (tmp_path / "util.py").write_text((own / "util.py").read_text(encoding="utf-8"), encoding="utf-8")
    data = tmp_path / "record.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = (own / "default.yaml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("dataset_", "training_split", "validation_split"))]
    where = ["dataset_path: json", f"dataset_kwargs: {json.dumps({'data_files': {'validation': str(data)}})}"]
    (tmp_path / "record.yaml").write_text("\n".join([*kept, *where, "validation_split: validation"]), encoding="utf-8")
    suites = load_suites(["super-glue-lm-eval-v1"], include_path=tmp_path)
    # CB's F1 is a mean of three, by a function of its own: no sum of pairs, so that its accuracy stands alone.
    assert {suite.name: (suite.metric, *suite.also) for suite in suites} == {
        "boolq": ("acc",), "cb": ("acc",), "multirc": ("acc",), "record": ("f1", "em")
    }  # fmt: skip


def test_a_task_that_runs_what_is_answered_is_refused(tmp_path: Path) -> None:
    task(tmp_path, "code", unsafe_code=True)
    with pytest.raises(RecipeError, match="found 'code', a task with answers that are run; expected text alone"):
        load_suites(["code"], include_path=tmp_path)


def test_a_task_without_its_data_is_refused(tmp_path: Path) -> None:
    task(tmp_path, "colours")
    (tmp_path / "colours.jsonl").unlink()
    with pytest.raises(RecipeError, match="found 'colours', which the harness cannot load"):
        load_suites(["colours"], include_path=tmp_path)


def test_a_document_without_a_prompt_is_refused(tmp_path: Path) -> None:
    rows = [*colours(3), {"question": "which?", "choices": ["red"], "label": 4}]
    task(tmp_path, "colours", rows=rows)
    suite = load_suites(["colours"], include_path=tmp_path)[0]
    with pytest.raises(RecipeError, match="found document 3 of 'colours', of which its task file makes no prompt"):
        suite_documents(suite)


def test_a_value_beyond_one_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "own.py").write_text("def score(doc, results):\n    return {'acc': 37.0}\n", encoding="utf-8")
    task(tmp_path, "large")
    path = tmp_path / "large.yaml"
    value = path.read_text(encoding="utf-8").removesuffix("}")
    path.write_text(value + ', "process_results": !function own.score}', encoding="utf-8")
    suites = load_suites(["large"], include_path=tmp_path)
    with pytest.raises(DataError, match="document 0 of 'large': found 37.0 as acc; expected a number between 0 and"):
        asked(base, suites)
