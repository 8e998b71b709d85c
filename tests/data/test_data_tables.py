"""Parquet files and `datasets` folders, in the layouts of well-known data sets, made here."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pictures import picture, png, same

from cppo.cli.main import main
from cppo.data import load_records, to_dataset
from cppo.data.tables import TableImage
from cppo.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def parts(record):
    """The parts of the last message, an image as None."""
    return [part.get("text") for part in record.prompt[-1]["content"]]


def write_images(folder, *seeds):
    (folder / "images").mkdir()
    for seed in seeds:
        picture(seed).save(folder / "images" / f"{seed}.png")


IMAGE_LIST = datasets.List(datasets.Image())


def test_geometry3k(tmp_path):
    """Images as `datasets` encodes them, a list a row; the mark says where the image stands."""
    rows = {
        "images": [[picture(1)], [picture(2), picture(3)], []],
        "problem": ["<image>Find x.", "Compare <image> with <image>!", "What is 3 + 4?"],
        "answer": ["3", "\\sqrt { 2 }", "7"],
    }
    features = datasets.Features(images=IMAGE_LIST, problem=datasets.Value("string"), answer=datasets.Value("string"))
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    source = load_records(str(path), columns="geometry3k")
    same(source[0].images, 1)
    same(source[1].images, 2, 3)
    assert source[2].images == ()
    assert parts(source[0]) == [None, "Find x."]
    assert parts(source[1]) == ["Compare ", None, " with ", None, "!"]
    assert (source[2].prompt, source[2].answer) == ("What is 3 + 4?", "7")
    assert all(isinstance(ref, TableImage) for row in source._parts[0].rows for ref in row.images)

    row = to_dataset(source, system_prompt="Think.")[1]
    same(row["images"], 2, 3)
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_virl39k(tmp_path):
    """Paths beside the file, several a row, boxed answers, ids."""
    write_images(tmp_path, 1, 2)
    rows = {
        "question": ["<image>\nWhat is A?", "<image><image>Which one?"],
        "answer": ["\\boxed{3}", "\\boxed{B}"],
        "image": [["images/1.png"], ["images/2.png", "images/1.png"]],
        "qid": ["q-0", "q-1"],
        "category": ["a", "b"],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "39Krelease.parquet")
    source = load_records(str(tmp_path / "39Krelease.parquet"), columns="virl39k")
    assert [record.id for record in source] == ["q-0", "q-1"]
    same(source[1].images, 2, 1)
    assert parts(source[1]) == [None, None, "Which one?"]
    assert source[0].answer == "\\boxed{3}"


def test_verl(tmp_path):
    """Chat prompts with a system turn, images as structs, the answer inside another column; no row group is one row."""
    rows = {
        "prompt": [
            [{"role": "system", "content": "Look."}, {"role": "user", "content": f"<image>Number {i}?"}]
            for i in range(150)
        ],
        "images": [[{"bytes": png(i), "path": None}] for i in range(150)],
        "reward_model": [{"style": "rule", "ground_truth": str(i)} for i in range(150)],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "test.parquet", row_group_size=40)
    source = load_records(str(tmp_path / "test.parquet"), columns="verl")
    assert [record.answer for record in source] == [str(i) for i in range(150)]
    same(source[149].images, 149)
    assert source[7].prompt[0] == {"role": "system", "content": [{"type": "text", "text": "Look."}]}
    assert parts(source[7]) == [None, "Number 7?"]


@pytest.mark.parametrize("cell", ["bytes", "struct", "path"])
def test_trl_rows_with_one_image(tmp_path, cell):
    write_images(tmp_path, 1)
    image = {"bytes": png(1), "struct": {"bytes": png(1), "path": "1.png"}, "path": "images/1.png"}[cell]
    rows = {"prompt": ["Which?", "How?"], "image": [image, None], "solution": ["$\\frac{1}{2}$", "3"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    source = load_records(str(tmp_path / "rows.parquet"), columns="trl")
    same(source[0].images, 1)
    assert source[1].images == ()
    assert source[0].answer == "$\\frac{1}{2}$"


def saved_folder(path):
    def split(first, count):
        rows = {
            "prompt": [f"q{i}" for i in range(first, first + count)],
            "answer": ["a"] * count,
            "image": [picture(i) for i in range(first, first + count)],
        }
        return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    datasets.DatasetDict({"train": split(0, 3), "test": split(3, 2)}).save_to_disk(str(path))


def test_a_folder_has_splits(tmp_path):
    saved_folder(tmp_path / "saved")
    train, test = (load_records(str(tmp_path / "saved"), split=split) for split in ("train", "test"))
    assert [record.prompt for record in [*train, *test]] == ["q0", "q1", "q2", "q3", "q4"]
    same(test[1].images, 4)
    alone = load_records(str(tmp_path / "saved" / "train"), split="test", limit=2)
    assert [record.prompt for record in alone] == ["q0", "q1"]
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"validation": saved["test"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="has no split 'train'; it has validation"):
        load_records(str(tmp_path / "other"))


def test_arrow_does_not_hold_a_parquet_file_as_a_whole(tmp_path, monkeypatch):
    """A file of 1.6 GB took 2.2 GB of memory with Arrow's default, and a third of it with this option."""
    path, builders, real = tmp_path / "rows.parquet", [], datasets.load_dataset_builder
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"], "answer": ["a"]}), path)

    def load_dataset_builder(*args, **options):
        builders.append(real(*args, **options))
        return builders[-1]

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert len(load_records(str(path))) == 1
    assert builders[0].config.fragment_scan_options.pre_buffer is False


def test_bad_rows_are_counted_with_their_numbers(tmp_path):
    images = [{"bytes": png(i), "path": None} for i in range(200)]
    images[41]["bytes"] = png(41)[:60]
    images[170] = {"bytes": None, "path": "../secret.png"}
    rows = {"prompt": [f"q{i}" for i in range(200)], "answer": ["a"] * 200, "images": [[image] for image in images]}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    source = load_records(str(path))
    assert len(source) == 198
    assert [number for number, _ in source.skipped] == [42, 171]
    assert "image (60 bytes) cannot be read" in source.skipped[0][1]
    assert "leaves the folder of the data file" in source.skipped[1][1]
    same(source[41].images, 42)


def test_files_that_are_no_tables(tmp_path, capsys):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and nothing else")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    for spec in (broken, folder):
        with pytest.raises(UserError, match="cannot be read") as caught:
            load_records(str(spec))
        assert "\n" not in str(caught.value)
    assert main(["eval", "--model", "micro", "--data", str(broken)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cppo: error: data '{broken}': cannot be read")
    assert "Traceback" not in error


def test_evaluation_reads_a_table(tmp_path):
    images = [[picture(seed, (64, 64))] for seed in (1, 2)]
    rows = {"problem": ["What is the sum?"] * 2, "answer": ["3", "4"], "images": images}
    table = datasets.Dataset.from_dict(rows).cast_column("images", IMAGE_LIST)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    argv = ["eval", "--model", "micro", "--data", str(tmp_path / "rows.parquet"), "--max_new_tokens", "4"]
    assert main([*argv, "--columns", "geometry3k", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["n"] == 2
