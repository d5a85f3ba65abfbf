"""A recipe is read whole or refused with every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from keeptune.config import load_recipe
from keeptune.errors import RecipeError

MINIMAL = "model: base\noutput_dir: runs/x\ndata: {tasks: [{path: a.jsonl}]}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.data.tasks[0].name == "a"
    assert list(recipe.methods) == ["full", "lora"]
    assert (recipe.data.validation_fraction, recipe.data.test_fraction) == (0.1, 0.1)


def test_the_written_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_set_overrides_a_field_and_a_list_element(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, overrides=["training.num_train_epochs=1", "data.tasks.0.max_records=7", "seed=3"])
    assert (recipe.training.num_train_epochs, recipe.data.tasks[0].max_records, recipe.seed) == (1, 7, 3)


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + "methods: {lora: {peft_type: lora, lora_dropout: 1e-1}}\n"))
    assert recipe.methods["lora"].model_extra == {"lora_dropout": 0.1}
    assert recipe.methods["lora"].peft_type == "LORA"


def test_what_keeps_the_base_is_no_argument_of_peft(tmp_path: Path) -> None:
    lora = "{peft_type: LORA, r: 4, replay_fraction: 0.05, replay_kl: 0.1}"
    recipe = load_recipe(
        write(tmp_path, MINIMAL + f"methods: {{full: {{frozen_layers: 2, l2_base: 0.1}}, lora: {lora}}}\n")
    )
    assert recipe.methods["lora"].model_extra == {"r": 4}
    assert (recipe.methods["lora"].replay_fraction, recipe.methods["lora"].replay_kl) == (0.05, 0.1)
    assert (recipe.methods["full"].frozen_layers, recipe.methods["full"].l2_base) == (2, 0.1)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = (
        "output_dir: x\n"
        "data: {tasks: [{path: a.jsonl}], validation_fracton: 0.1, max_length: many}\n"
        "training: {num_train_epochs: 0, lr_scheduler_type: linar}\n"
    )
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert f"{path}: model: found nothing; expected a value. Add this key." in lines
    assert any("Did you mean 'validation_fraction'?" in line for line in lines)
    assert any("data.max_length: found 'many'; expected a whole number" in line for line in lines)
    assert any("found 'linar'; expected 'linear', 'cosine' or 'constant_with_cooldown'" in line for line in lines)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "evaluation: {metrics: [rougeL], select_by: bleu}\n",
            "found select_by: bleu; expected loss or one of metrics",
        ),
        (
            "evaluation: {metrics: [rougel], select_by: rougeL}\n",
            "token_f1, char_f1, loss, perplexity. Did you mean rougeL?",
        ),
        (
            "evaluation: {metrics: [rougeL], select_by: rouge_l}\n",
            "found select_by: rouge_l; expected loss or one of metrics. Did you mean",
        ),
        ("methods: {full: {learning_rte: 1}}\n", "fine-tuning. Did you mean 'learning_rate'?"),
        ("methods: {lora: 3}\n", "methods.lora: found 3; expected a section. Fix"),
        ("training: {tokens_per_step: aut}\n", "found 'aut'; expected a whole number or 'auto'. Fix this value."),
        ("training: {bf16: maybe}\n", "training.bf16: found 'maybe'; expected true or false. Fix"),
        ("training: {num_train_epochs: null}\n", "found null; expected a whole number. Fix this value."),
        ("evaluation: {metrics: rougeL}\n", "evaluation.metrics: found 'rougeL'; expected a list. Fix this value."),
        ("methods: {lora: {peft_type: LORA, lr: 1e-3}}\n", "found lr; expected learning_rate. Rename the key."),
        ("methods: {full: {r: 8}}\n", "found r without peft_type; expected only learning_rate"),
        (
            "methods: {lora: {peft_type: LORA, frozen_layers: 2}}\n",
            "methods.lora: found frozen_layers with peft_type, where the base model stays as it is; expected it for "
            "full fine-tuning alone. Use layers_to_transform, PEFT's own list of the layers that it adapts.",
        ),
        (
            "methods: {lora: {peft_type: LORA, l2_base: 1e-3}}\n",
            "methods.lora: found l2_base with peft_type; expected it for full fine-tuning alone. Use "
            "training.weight_decay, which pulls LoRA's factors, and with them the model, to the base model.",
        ),
        (
            "methods: {full: {replay_kl: 0.1}}\n",
            "methods.full: found replay_kl without replay_fraction, where it has no effect; expected both. Set "
            "replay_fraction, or remove replay_kl.",
        ),
        (
            "retention: {harness: {max_records: 5}}\n",
            "retention.harness: found max_records without tasks, where it has no effect; expected both. Name tasks.",
        ),
        (
            "retention: {harness: {tasks: [others]}}\n",
            "retention.harness: found the harness task 'others', a name that means something else. Rename the task.",
        ),
        (
            "retention: {harness: {tasks: [arc_easy, arc_easy]}}\n",
            "found 'arc_easy' twice among tasks, texts and harness tasks; expected each name once.",
        ),
        (
            "retention: {harness: {tasks: [arc_easy]}, budget: {arc_esy: 2 points}}\n",
            "found 'arc_esy' in retention.budget; expected a suite: self, arc_easy. Did you mean 'arc_easy'?",
        ),
        (
            "retention: {harness: {tasks: [arc_easy]}, replay: arc_easy}\n",
            "found 'arc_easy' in retention.replay; expected a suite: self.",
        ),
        ("retention: {harness: {task: [arc_easy]}}\n", "retention.harness.task: found an unknown key"),
        ("methods: {full: {replay_fraction: 1.0}}\n", "methods.full.replay_fraction: found 1.0; expected"),
        ("methods: {full: {frozen_layers: -1}}\n", "methods.full.frozen_layers: found -1; expected"),
        ("methods: {full: {frozen_layer: 1}}\n", "fine-tuning. Did you mean 'frozen_layers'?"),
        ("methods: {base: {}}\n", "found the method name 'base'"),
        ("methods: {comparisons: {}}\n", "found the method name 'comparisons'"),
        ("methods: {'../x': {}}\n", "found the method name '../x'"),
        ("training: {eval_steps: 5, evals_per_epoch: 3}\n", "found eval_steps and evals_per_epoch; expected one"),
        ("training: {cooldown_fraction: 0.5}\n", "found cooldown_fraction without effect"),
        ("retention: {loss_cap: 2}\n", "found loss_cap without effect; expected it with a budget in nats"),
        ("retention: {probe_fraction: 0.1}\n", "found probe_fraction without effect; expected it with a budget"),
        ("retention: {ledger: team.jsonl}\n", "found ledger without effect; expected it with a budget. Remove it"),
        (
            "evaluation: {baselines: [zero-shot, nearest], num_draws: 2}\n",
            "evaluation: found num_draws without effect; expected it only with few-shot among baselines.",
        ),
        (
            "retention: {budget: {others: 2 points}}\nevaluation: {baselines: [few-shot]}\n",
            "found a budget of others and evaluation.baselines without zero-shot; expected it, as a certificate sets",
        ),
        (
            "evaluation: {baselines: [zero-shot], num_shots: [2]}\n",
            "found num_shots without effect; expected it only with few-shot or nearest among baselines.",
        ),
        (
            "evaluation: {baselines: [nearest], num_shots: [2, 8]}\n",
            "found several num_shots for nearest alone, which shows the largest; expected one number.",
        ),
        ("evaluation: {num_shots: [2, 2]}\n", "found a number of num_shots twice; expected each once."),
        ("evaluation: {num_shots: []}\n", "evaluation.num_shots: found []; expected"),
        (
            "training: {num_train_epochs: 1000000000}\n",
            "training.num_train_epochs: found 1000000000; expected less than or equal to 10000.",
        ),
        (
            "training: {evals_per_epoch: 1000000000}\n",
            "training.evals_per_epoch: found 1000000000; expected less than or equal to 1000.",
        ),
        (
            "evaluation: {num_draws: 1000000}\n",
            "evaluation.num_draws: found 1000000; expected less than or equal to 100.",
        ),
        ("evaluation: {num_shots: [0]}\n", "evaluation.num_shots.0: found 0; expected greater than or equal to 1."),
        ("evaluation: {baselines: [five-shot]}\n", "found 'five-shot'; expected 'zero-shot', 'few-shot' or 'nearest'"),
        ("seed: .nan\n", "seed"),
        ("methods: {lora: {peft_type: LORA, learning_rate: .inf}}\n", "learning_rate"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL + more))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("[{path: a.jsonl}, {path: b/a.csv}]", "found the task name 'a' twice; expected each once"),
        ("[{path: a.jsonl, name: all}]", "found the task name 'all', under which scores stand of several tasks"),
        ("[{path: others.jsonl}]", "found the task name 'others', under which scores stand of several tasks"),
        (
            "[{path: a.jsonl, train: false}, {path: b.jsonl, train: false}]",
            "data: found train: false in every task; expected one or more to train on. Remove it from one of them.",
        ),
        (
            "[{path: a.jsonl, columns: {prompt: q}}]",
            "found columns for prompt; expected both prompt and completion, or messages alone",
        ),
        ("[{path: a.jsonl, instruction: Do.}]", "found instruction without columns"),
        ("[{path: a.jsonl, columns: {promt: q, completion: a}}]", "'prompt', 'completion' or 'messages'"),
        ("[]", "data.tasks: found []; expected"),
    ],
)
def test_bad_tasks_are_refused(tmp_path: Path, tasks: str, message: str) -> None:
    text = f"model: base\noutput_dir: x\ndata: {{tasks: {tasks}}}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "recipe.yaml:1: found no valid YAML (expected the node content"),
        ("model: a\noutput_dir: b: c\n", "recipe.yaml:2: found no valid YAML (mapping values are not allowed here)"),
        ("model: \x01\n", "found no valid YAML (unacceptable character #x0001: special characters are not allowed at"),
        ("", "found an empty file; expected `key: value` lines"),
        ("- a\n", "found a list; expected `key: value` lines"),
        ("a: &x 1\nb: *x\n", "recipe.yaml:2: found no valid YAML (aliases (*name) are not accepted)"),
        ("a: 1\nb: 2026-13-45\n", "recipe.yaml:2: found no valid YAML (2026-13-45 is no valid timestamp)"),
        ("a: 0x_\n", "recipe.yaml:1: found no valid YAML (0x_ is no valid int)"),
        ("a: !!int abc\n", "recipe.yaml:1: found no valid YAML (abc is no valid int)"),
        (f"a: {'9' * 5000}\n", f"found no valid YAML ({'9' * 40} is no valid int)"),
        ("[a]: 1\n", "recipe.yaml:1: found no valid YAML (a key that is no plain value)"),
        ("a: 1\n" * 60000, "found 300000 bytes; expected a recipe of at most 256 KiB"),
        ("model: a\nmodel: b\n", "recipe.yaml:2: found no valid YAML (the key 'model' stands twice)"),
        ("model: !!python/object/apply:os.system [ls]\n", "found no valid YAML"),
        ("[" * 20000, "found no valid YAML"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "unicode string" not in str(caught.value)


def test_a_folder_in_the_place_of_a_recipe_names_the_recipes_in_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found a folder; expected a recipe\. No \.yaml file is in it"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").touch()
    (tmp_path / "a.yaml").touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: found a folder; expected a recipe. Name one of those in it: {tmp_path / 'a.yaml'}, "
        f"{tmp_path / 'b.yaml'}."
    )


def test_data_in_the_place_of_a_recipe_are_told(tmp_path: Path) -> None:
    # One line of JSON lines is a recipe's YAML too.
    for name in ("rows.jsonl", "rows.csv", "rows.json.gz"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}')
        with pytest.raises(RecipeError, match=r"found a file of data, by its name; .* Data are named in a recipe"):
            load_recipe(tmp_path / name)
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "completion": "b"}]')
    with pytest.raises(RecipeError, match=r"found a list; .* Data are named in a recipe: `data: "):
        load_recipe(tmp_path / "rows.json")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found no readable recipe"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "found no `key=value`"),
        ("data.tasks.5.path=x", "found '5'; expected a number from 0 to 0"),
        ("model.x=1", "found a plain value at 'model'; expected a section"),
        ("seed=[", "found no valid YAML after `=`"),
        ("training.num_epochs=1", "Did you mean 'num_train_epochs'?"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL), overrides=[override])
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "keeptune" / "recipes").glob("*.yaml")), ids=str)
def test_the_recipes_that_ship_are_valid(path: Path) -> None:
    assert yaml.safe_load(load_recipe(path).to_yaml())["model"]


def test_the_largest_number_of_shots_alone_may_be_asked_of_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "evaluation: {baselines: [nearest], num_shots: [8]}\n")
    evaluation = load_recipe(path).evaluation
    assert (evaluation.baselines, evaluation.num_shots, evaluation.num_draws) == (("nearest",), (8,), 3)


def test_a_task_is_named_by_its_file_up_to_64_characters(tmp_path: Path) -> None:
    text = f"model: base\noutput_dir: x\ndata: {{tasks: [{{path: 'my data/{'n' * 70}.jsonl.gz'}}]}}\n"
    assert load_recipe(write(tmp_path, text)).data.tasks[0].name == "n" * 64


def test_a_task_is_trained_on_unless_the_recipe_says_no(tmp_path: Path) -> None:
    text = "model: base\noutput_dir: x\ndata: {tasks: [{path: a.jsonl}, {path: b.jsonl, train: false}]}\n"
    assert [task.train for task in load_recipe(write(tmp_path, text)).data.tasks] == [True, False]


def test_validation_of_a_task_that_is_only_scored_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("a.jsonl}", "a.jsonl, train: false, validation: b.jsonl}"))
    with pytest.raises(RecipeError, match=r"validation beside train: false.*Remove validation"):
        load_recipe(path)


TASKS = "[{path: a.jsonl}, {path: b.jsonl}, {path: c.jsonl, train: false}]"


def with_mixture(folder: Path, mixture: str) -> Path:
    return write(folder, f"model: base\noutput_dir: x\ndata:\n  tasks: {TASKS}\n  mixture: {mixture}\n")


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("null", None),
        ("equal", "equal"),
        ("{}", (None, 1.0, None)),
        ("{cap: 3000, temperature: 2}", (3000, 2.0, None)),
        ("{weights: {a: 1, b: 0.5}}", (None, 1.0, {"a": 1.0, "b": 0.5})),
    ],
)
def test_a_mixture_is_equal_or_a_section_and_reads_back_as_itself(
    mixture: str, expected: object, tmp_path: Path
) -> None:
    recipe = load_recipe(with_mixture(tmp_path, mixture))
    found = recipe.data.mixture
    assert found == expected or (found.cap, found.temperature, found.weights) == expected  # pyright: ignore
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            "even",
            "data.mixture: found 'even'; expected equal, {cap: K, temperature: T} or {weights: {task: number}}. "
            "Write one of these.",
        ),
        (
            "[a]",
            "data.mixture: found ['a']; expected equal, {cap: K, temperature: T} or {weights: {task: number}}. "
            "Write one of these.",
        ),
        ("{cap: 0}", "data.mixture.cap: found 0; expected greater than or equal to 1. Fix this value."),
        (
            "{temperature: 0.5}",
            "data.mixture.temperature: found 0.5; expected greater than or equal to 1. Fix this value.",
        ),
        ("{caps: 3}", "data.mixture.caps: found an unknown key; expected one that keeptune knows. Did you mean 'cap'?"),
        ("{weights: {a: 0, b: 1}}", "data.mixture.weights.a: found 0; expected greater than 0. Fix this value."),
        ("{weights: {a: 1, b: -2}}", "data.mixture.weights.b: found -2; expected greater than 0. Fix this value."),
        (
            "{cap: 5, weights: {a: 1, b: 1}}",
            "data.mixture: found cap beside weights, where it has no effect; expected one of them. Remove one.",
        ),
        (
            "{weights: {a: 1, bb: 1}}",
            "data: found a weight for 'bb' in mixture.weights; expected a task that is trained on: a, b. "
            "Did you mean 'b'?",
        ),
        (
            "{weights: {a: 1, b: 1, poems: 1}}",
            "data: found a weight for 'poems' in mixture.weights; expected a task that is trained on: a, b. "
            "Remove the weight.",
        ),
        (
            "{weights: {a: 1, b: 1, c: 1}}",
            "data: found a weight for 'c' in mixture.weights, a task with train: false; expected tasks that are "
            "trained on. Remove the weight, or train: false.",
        ),
        (
            "{weights: {a: 1}}",
            "data: found no weight for 'b' in mixture.weights; expected one for each task that is trained on. Add it, "
            "or set train: false in that task.",
        ),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(mixture: str, message: str, tmp_path: Path) -> None:
    path = with_mixture(tmp_path, mixture)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("{path: [b.jsonl, c.jsonl], name: both}", "both"),
        ("{path: 'poems/ag_news_*.jsonl.gz'}", "ag_news"),
        ("{path: 'poems/*_news.jsonl', name: news}", "news"),
    ],
)
def test_several_files_are_one_task(task: str, expected: str, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("{path: a.jsonl}", task)))
    assert recipe.data.tasks[0].name == expected
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{path: [a.jsonl, b.jsonl]}", "found a list of files without a name; expected one for the task"),
        ("{path: '*_news.jsonl'}", "found the task name '_news'; expected letters"),
        ("{path: [], name: a}", "data.tasks.0.path: found []; expected text or at least one entry"),
        (
            "{path: a.jsonl, columns: {prompt: a, completion: b}, instruction: []}",
            "data.tasks.0.instruction: found []; expected text or at least one entry",
        ),
    ],
)
def test_lists_of_nothing_and_without_a_name_are_refused(task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, MINIMAL.replace("{path: a.jsonl}", task)))
    assert message in str(caught.value)


@pytest.mark.parametrize("mixture", ["equal", "{weights: {a: 1}}", "{cap: 5, temperature: 2}"])
def test_parts_of_a_single_trained_task_are_refused(mixture: str, tmp_path: Path) -> None:
    path = with_mixture(tmp_path, mixture)
    path.write_text(path.read_text().replace("{path: b.jsonl}", "{path: b.jsonl, train: false}"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    key = mixture.split(": ")[0].strip("{") if "temperature" not in mixture else "temperature"
    assert str(caught.value) == (
        f"{path}: data: found {key} as mixture, and one task that is trained on, where it has no effect; expected "
        "several such tasks. Remove it."
    )


def test_a_cap_shortens_the_epoch_of_a_single_task_too(tmp_path: Path) -> None:
    path = with_mixture(tmp_path, "{cap: 5}")
    path.write_text(path.read_text().replace("{path: b.jsonl}", "{path: b.jsonl, train: false}"))
    assert load_recipe(path).data.mixture is not None


def refused(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize(
    ("section", "found"),
    [
        (
            "data: {tasks: [{path: a.jsonl, columns: {prompt: 3, completion: b}}]}",
            "data.tasks.0.columns.prompt: found 3",
        ),
        ("data: {tasks: [{path: [b.jsonl, 3], name: t}]}", "data.tasks.0.path.1: found 3; expected text."),
        ("data: {tasks: [{path: ['']}]}", "data.tasks.0.path.0: found ''; expected text that is not empty."),
        ("data: {tasks: [{path: a.jsonl}]}\nretention: {texts: [{path: 3}]}", "retention.texts.0.path: found 3"),
        ("data: {tasks: [{path: a.jsonl}]}\nevaluation: {num_shots: [0]}", "evaluation.num_shots.0: found 0; expected"),
        (
            "data: {tasks: [{path: a.jsonl}]}\nevaluation: {metrics: [3]}",
            "evaluation.metrics.0: found 3; expected text",
        ),
    ],
)
def test_one_fault_is_one_message(tmp_path: Path, section: str, found: str) -> None:
    (message,) = refused(tmp_path, f"model: m\noutput_dir: o\n{section}\n")
    assert message.startswith(f"recipe.yaml: {found}")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("training: {learning_rat: 1}", "methods.*.learning_rate"),
        ("learning_rate: 1", "methods.*.learning_rate"),
        ("metric: [bleu]", "evaluation.metrics"),
        ("evaluation: {num_train_epoch: 1}", "training.num_train_epochs"),
        ("training: {warmup_ration: 0.1}", "warmup_ratio"),
        ("modle: m", "model"),
    ],
)
def test_an_unknown_key_proposes_the_nearest_of_all_sections(tmp_path: Path, text: str, meant: str) -> None:
    (message,) = refused(tmp_path, f"model: m\noutput_dir: o\ndata: {{tasks: [{{path: a.jsonl}}]}}\n{text}\n")
    assert message.endswith(f"Did you mean {meant!r}?")


def test_thousands_of_unknown_keys_are_counted(tmp_path: Path) -> None:
    text = "".join(f"zzz{i}: 1\n" for i in range(3000))
    messages = refused(tmp_path, f"model: m\noutput_dir: o\ndata: {{tasks: [{{path: a.jsonl}}]}}\n{text}")
    assert (len(messages), messages[-1]) == (11, "and 2,990 more.")


def test_a_prompt_of_several_columns_and_labels_are_read(tmp_path: Path) -> None:
    task = "{path: a.csv, columns: {prompt: [subject, body], completion: kind}, labels: %s, ignore: [image]}"
    text = f"model: m\noutput_dir: o\ndata: {{tasks: [{task}]}}\n"
    read = load_recipe(write(tmp_path, text % "[bad, good]")).data.tasks[0]
    assert read.columns == {"prompt": ("subject", "body"), "completion": "kind"}
    assert (read.labels, read.ignore) == ({"0": "bad", "1": "good"}, ("image",))
    named = load_recipe(write(tmp_path, text % "{1: World, 2.0: 3, ' a ': b}")).data.tasks[0]
    assert named.labels == {"1": "World", "2": "3", "a": "b"}
    (message,) = refused(tmp_path, text % "[no, yes]")
    assert "found true or false in labels, as YAML reads yes and no; expected text. Quote the names." in message
    (message,) = refused(tmp_path, text.replace("kind", "[kind, other]") % "[a]")
    assert "found a list of columns for completion; expected one" in message


@pytest.mark.parametrize("path", ['"a\\0b"', '"a\\eb"', '"a\\nb"'])
def test_a_path_with_control_characters_is_refused(tmp_path: Path, path: str) -> None:
    (message,) = refused(tmp_path, f"model: m\noutput_dir: {path}\ndata: {{tasks: [{{path: a.jsonl}}]}}\n")
    assert message.startswith("recipe.yaml: output_dir: found 'a\\")
