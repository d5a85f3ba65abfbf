"""The hub: ids, commits, configurations and splits, with a stand-in for its libraries."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keeptune.data.source import Row, read_rows, source_sha256
from keeptune.errors import DataError, RecipeError
from tests.data.rows import TWO, lines, refusal, rows, written

COMMIT = "0123456789abcdef" * 2 + "01234567"
NAME = f"owner/name@{COMMIT}"


class Streamed(list[Any]):
    """Rows as `datasets` streams them."""

    features: Any = None

    def shuffle(self, *, seed: int, buffer_size: int) -> Streamed:
        assert buffer_size == 10_000
        return Streamed(random.Random(seed).sample(self, len(self)))


class Hub:
    """One data set: its configurations, each with its splits."""

    def __init__(self) -> None:
        self.configs: dict[str, dict[str, Any]] = {"default": {"train": TWO[:1], "test": TWO[1:]}}
        self.error = ""
        self.streamed: list[bool] = []

    def load_dataset(self, path: str, *, name: str | None, revision: str, split: str | None, streaming: bool) -> Any:
        assert (path, revision) == ("owner/name", COMMIT)
        if self.error:
            raise RuntimeError(self.error)
        self.streamed.append(streaming)
        found = self.configs[name or "default"]
        return found if split is None else found[split]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stored = Hub()

    class HfApi:
        def dataset_info(self, name: str, *, revision: str | None) -> Any:
            if revision == "gone":
                raise ConnectionError("no route")
            return types.SimpleNamespace(sha=COMMIT)

    def config_names(path: str, *, revision: str) -> list[str]:
        return list(stored.configs)

    def split_names(path: str, *, config_name: str | None, revision: str) -> list[str]:
        return list(stored.configs[config_name or "default"])

    datasets = types.SimpleNamespace(
        load_dataset=stored.load_dataset,
        get_dataset_config_names=config_names,
        get_dataset_split_names=split_names,
        exceptions=types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {})),
    )
    library = types.SimpleNamespace(HfApi=HfApi, errors=types.SimpleNamespace(HTTPError=ConnectionError))
    monkeypatch.setitem(sys.modules, "datasets", datasets)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)  # type: ignore[arg-type]
    yield stored


def read(*, config: str | None = None, split: str | None = None, max_records: int | None = None) -> list[Row]:
    named = {"config": config, "split": split, "max_records": max_records}
    return list(read_rows("owner/name", revision=None, validation=None, test=None, **named))  # type: ignore[arg-type]


def test_hub_rows_carry_id_commit_split_and_index(hub: Hub, tmp_path: Path) -> None:
    hub.configs["default"]["unsupervised"] = [{}]
    for path, revision in (("owner/name", None), ("owner/name@v1", None), ("owner/name", "v1"), (NAME, None)):
        assert rows(path, revision=revision) == [
            Row(TWO[0], f"{NAME}/train[0]", None),
            Row(TWO[1], f"{NAME}/test[0]", "test"),
        ]
    assert source_sha256("owner/name", revision="v1", validation=None, test=None) == NAME
    own = written(tmp_path / "own.jsonl", lines(TWO[:1]))
    assert [row.split for row in rows("owner/name", validation=str(own))] == ["train", "test", "validation"]
    assert len(source_sha256("owner/name", revision=None, validation=str(own), test=None)) == 64


def test_the_only_split_of_a_hub_data_set_is_unsplit(hub: Hub) -> None:
    hub.configs["default"] = {"all": TWO}
    assert [row.split for row in rows("owner/name")] == [None, None]


def test_a_configuration_and_a_split_are_read_by_their_names(hub: Hub) -> None:
    hub.configs = {"sst2": {"train": TWO, "test": TWO[:1]}, "cola": {"train": [], "test": []}}
    assert read(config="sst2", split="test") == [Row(TWO[0], f"{NAME}/sst2/test[0]", None)]
    assert [row.split for row in read(config="sst2")] == [None, None, "test"]


def test_class_labels_of_the_hub_arrive_as_their_names(hub: Hub) -> None:
    table = Streamed([{"text": "a", "label": 1}, {"text": "b", "label": -1}])
    table.features = {"text": object(), "label": types.SimpleNamespace(names=["negative", "positive"])}
    hub.configs["default"] = {"train": table}
    assert [row.value["label"] for row in rows("owner/name")] == ["positive", None]


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [
        (None, None, "found several configurations, 3.0.0, sst2; expected the name of one. Add it to this task, for "
         'instance `config: "3.0.0"`.'),
        ("sst", None, "found no configuration 'sst'; expected one of 3.0.0, sst2. Did you mean `config: sst2`?"),
        ("3.0.0", "tests", "found no split 'tests'; expected one of train, test. Did you mean `split: test`?"),
        ("3.0.0", "zzz", "found no split 'zzz'; expected one of train, test. Name one of these as `split`"),
    ],
)  # fmt: skip
def test_a_configuration_or_split_that_is_missing_is_told_before_anything_is_read(
    hub: Hub, config: str | None, split: str | None, message: str
) -> None:
    hub.configs = {"3.0.0": {"train": TWO, "test": TWO}, "sst2": {"train": TWO}}
    with pytest.raises(DataError) as caught:
        source_sha256("owner/name", revision=None, validation=None, test=None, config=config, split=split)
    assert message in str(caught.value)
    assert not hub.streamed


def test_a_capped_data_set_is_streamed_and_its_train_split_read_in_part(hub: Hub) -> None:
    many = [{"prompt": str(i), "completion": "b"} for i in range(10_001)]
    hub.configs["default"] = {"train": Streamed(many), "test": Streamed(TWO)}
    said: list[str] = []
    found = list(read_rows("owner/name", revision=None, validation=None, test=None, max_records=500, say=said.append))
    assert hub.streamed == [True]
    assert [len([r for r in found if r.split == split]) for split in (None, "test")] == [10_000, 2]
    assert [int(row.value["prompt"]) for row in found[:10_000]] != list(range(10_000))
    assert said == [
        f"{NAME}/train: read 10,000 rows, as max_records is 500, and left the others on the hub; without max_records "
        "all are read."
    ]


def test_hub_refusals(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "owner/name@gone: found no local path, and no data set on the hub (no route)"
        in f"owner/{refusal('owner/name@gone')}"
    )
    with pytest.raises(RecipeError, match="found revision 'b' as well; expected one of the two"):
        rows("owner/name@a", revision="b")
    own = written(tmp_path / "own.jsonl", lines(TWO))
    assert "found the splits train, test with own files for test; expected train" in refusal(
        "owner/name", test=str(own)
    )
    hub.error = "no route"
    assert "found no data set that can be loaded (no route)" in refusal("owner/name")
    hub.error = "Dataset scripts are no longer supported, but found name.py"
    assert "Set `revision: refs/convert/parquet` in this task" in refusal("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'keeptune\[hub\]'"):
        rows("owner/name")


def test_what_is_for_the_hub_alone_is_refused_for_a_local_path(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines(TWO))
    with pytest.raises(RecipeError, match="found split 'train' for a local path, where it has no effect"):
        list(read_rows(str(path), revision=None, validation=None, test=None, split="train"))


@pytest.mark.slow
def test_the_real_library_knows_configurations_and_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the folder `owner/name` where it stands for the data set of that name."""
    pytest.importorskip("datasets")
    folder = tmp_path / "here/owner/name"
    folder.mkdir(parents=True)
    (tmp_path / "there").mkdir()
    for split, number in (("train", 30), ("test", 5)):
        written(
            folder / f"{split}.jsonl", lines([{"prompt": f"{split} {i}", "completion": "b"} for i in range(number)])
        )
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in ("train", "test"))
    written(folder / "README.md", "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n{files}" for name in ("one", "two")
    ) + "---\n")  # fmt: skip
    monkeypatch.chdir(tmp_path / "here")

    def found(**more: Any) -> list[Row]:
        named = {"revision": None, "validation": None, "test": None, "base_folder": tmp_path / "there", **more}
        return list(read_rows(NAME, **named))

    with pytest.raises(DataError, match="found several configurations, one, two; expected the name of one"):
        found()
    with pytest.raises(DataError, match=r"found no split 'tset'; .* Did you mean `split: test`"):
        found(config="two", split="tset")
    assert [row.split for row in found(config="two")] == [None] * 30 + ["test"] * 5
    assert [row.origin for row in found(config="two", split="test")] == [f"{NAME}/two/test[{i}]" for i in range(5)]
    streamed = found(config="one", split="train", max_records=3)
    assert sorted(row.value["prompt"] for row in streamed) == sorted(f"train {i}" for i in range(30))
