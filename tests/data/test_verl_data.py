"""`cppo verl-data`: rows in verl's layout, which hold what the records hold."""

import io

import pytest
from PIL import Image, ImageChops

from cppo.cli.main import main
from cppo.data import load_records, load_rows
from cppo.errors import UserError
from cppo.verl.data import write_parquet

pq = pytest.importorskip("pyarrow.parquet")


def test_written_rows_are_read_back(tmp_path, capsys):
    file = tmp_path / "train.parquet"
    argv = ["verl-data", "tasks:digits?noise=150", "tasks:shapes", "--split", "test", "--limit", "3"]
    assert main([*argv, "--prompt_suffix", "Think.", "--out", str(file)]) == 0
    assert "rows        3" in capsys.readouterr().out
    wanted = load_records(["tasks:digits?noise=150", "tasks:shapes"], split="test", limit=3, prompt_suffix="Think.")
    found = load_records(str(file), columns="verl")
    assert len(found) == len(wanted) == 3
    for before, after in zip(wanted, found, strict=True):
        assert after.answer == before.answer
        assert after.prompt == [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": before.prompt}]}
        ]
        assert not ImageChops.difference(before.images[0], after.images[0]).getbbox()


def rows_of(tmp_path, *rows, **options):
    file = tmp_path / "rows.parquet"
    write_parquet(load_rows(rows), file, "own", **options)
    return pq.read_table(file).to_pylist()


def test_each_column(tmp_path):
    image = Image.new("RGB", (28, 56), "red")
    given = {
        "id": "first",
        "prompt": [{"role": "user", "content": "<image>What is it? <image>Which?"}],
        "images": [image, image],
        "answer": 12,
        "choices": ["a", "b"],
    }
    pictures, text = rows_of(tmp_path, given, {"prompt": "1 + 1?", "answer": "2"}, system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert pictures["prompt"] == [system, {"role": "user", "content": "<image>What is it? <image>Which?"}]
    assert [Image.open(io.BytesIO(one["bytes"])).size for one in pictures["images"]] == [(28, 56)] * 2
    assert pictures["reward_model"] == {"style": "rule", "ground_truth": "12"}
    assert pictures["extra_info"] == {"index": 0, "sample_id": "first", "choices": ["a", "b"]}
    assert pictures["data_source"] == "own"
    assert text["prompt"] == [system, {"role": "user", "content": "1 + 1?"}]
    assert text["images"] == []
    assert text["extra_info"]["choices"] is None


def test_a_mark_that_verl_would_read(tmp_path):
    image = Image.new("RGB", (28, 28))
    with pytest.raises(UserError, match="row 1: verl would read <audio>"):
        rows_of(tmp_path, {"prompt": "What does <audio> mean?", "images": [image], "answer": "sound"})
    assert len(rows_of(tmp_path, {"prompt": "What does <audio> mean?", "answer": "sound"})) == 1


def test_bad_arguments(refused, tmp_path):
    out = str(tmp_path / "a.parquet")
    assert "--out" in refused("verl-data", "tasks:digits")
    assert "no such folder" in refused("verl-data", "tasks:digits", "--out", tmp_path / "no" / "a.parquet")
    assert "digit" in refused("verl-data", "tasks:digit", "--out", out)


def test_the_data_is_not_replaced(tmp_path, refused):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "2 + 2", "answer": "4"}\n')
    assert "is the data itself" in refused("verl-data", str(file), "--out", str(tmp_path / "." / "rows.jsonl"))
    assert file.read_text().startswith("{")
