"""What a cell holds: Arrow's nulls, class labels, numbers of every kind, and media that no model is shown."""

import decimal
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pictures import picture

from cppo.data import load_records, load_rows
from cppo.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(tmp_path, table, **options):
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    return load_records(str(tmp_path / "rows.parquet"), **options)


def answers(tmp_path, values):
    return [
        record.answer for record in read(tmp_path, pyarrow.table({"prompt": ["q"] * len(values), "answer": values}))
    ]


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "Which?"}


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": [{**IMAGE, "text": None}, TEXT]}],
        [{"role": "user", "content": [{**IMAGE, "text": None, "image": None}, {**TEXT, "image": None}]}],
        [
            {
                "role": "user",
                "content": [{**IMAGE, "image_url": {"url": None}, "text": None}, {**TEXT, "image_url": None}],
            }
        ],
        [{"role": "user", "content": [{**IMAGE, "resized_height": None, "text": None}, TEXT], "name": None}],
        [
            {"role": "system", "content": [{"type": "text", "text": "Look."}], "tool_calls": None},
            {"role": "user", "content": [{**IMAGE, "text": None, "video": None, "audio": None}, TEXT]},
        ],
    ],
)
def test_nulls_in_the_parts_of_a_message_say_nothing(prompt):
    """Arrow gives every part the keys of all parts."""
    (record,) = load_rows([{"prompt": prompt, "answer": "a", "images": [picture(1)]}])
    assert record.prompt[-1] == {"role": "user", "content": [IMAGE, TEXT]}


def test_parts_that_arrow_stored(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": [IMAGE, TEXT]}], "images": [picture(1)], "answer": "a"}] * 2
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    source = load_records(str(tmp_path / "rows.parquet"))
    assert source[1].prompt == [{"role": "user", "content": [IMAGE, TEXT]}]
    with pytest.raises(UserError, match="content parts are"):
        load_rows([{"prompt": [{"role": "user", "content": [{**IMAGE, "image": "a.png"}]}], "answer": "a"}])


LABEL = datasets.ClassLabel(names=["cat", "dog", "two words"])


@pytest.mark.parametrize("saved", ["folder", "parquet"])
def test_class_labels_are_their_names(tmp_path, saved):
    """In a column, in a list, inside another column, and where there is none."""
    features = {"prompt": datasets.Value("string"), "answer": LABEL, "choices": datasets.List(LABEL)}
    features |= {"id": datasets.Value("int64"), "about": {"kind": LABEL}}
    rows = {"prompt": ["a?", "b?", "c?"], "answer": ["dog", 2, "cat"], "choices": [[0, 1], [], [2]], "id": [0, 1, 2]}
    rows["about"] = [{"kind": "cat"}, {"kind": "two words"}, {"kind": "dog"}]
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    path = tmp_path / ("saved" if saved == "folder" else "rows.parquet")
    table.save_to_disk(str(path)) if saved == "folder" else table.to_parquet(str(path))
    source = load_records(str(path))
    assert [record.answer for record in source] == ["dog", "two words", "cat"]
    assert [record.choices for record in source] == [("cat", "dog"), None, ("two words",)]
    assert [record.id for record in source] == ["0", "1", "2"]
    inner = load_records(str(path), columns={"answer": "about.kind"})
    assert [record.answer for record in inner] == ["cat", "two words", "dog"]


def test_a_missing_class_label_is_a_bad_row(tmp_path):
    features = datasets.Features({"prompt": datasets.Value("string"), "answer": LABEL})
    rows = {"prompt": ["a?", "b?", "c?"], "answer": ["dog", None, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    source = load_records(str(tmp_path / "rows.parquet"), max_bad_fraction=0.9)
    assert [record.answer for record in source] == ["dog"]
    assert [reason.partition(": ")[2] for _, reason in source.skipped] == ["column 'answer' is missing or null"] * 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pyarrow.array([0.1, 2.5, -1e-7, 16777216], pyarrow.float32()), ["0.1", "2.5", "-1e-07", "16777216.0"]),
        (pyarrow.array(np.array([0.1, 3.14], np.float16)), ["0.1", "3.14"]),
        (pyarrow.array([0.1, 1 / 3]), ["0.1", "0.3333333333333333"]),
        (pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("-200.00")]), ["1.50", "-200.00"]),
        (pyarrow.array([decimal.Decimal("0.0000000001"), None]).slice(0, 1), ["0.0000000001"]),
        (pyarrow.array([255, 0], pyarrow.uint8()), ["255", "0"]),
        (pyarrow.array([2**63], pyarrow.uint64()), [str(2**63)]),
    ],
)
def test_numbers_are_written_as_the_column_holds_them(tmp_path, values, expected):
    assert answers(tmp_path, values) == expected


def test_numbers_inside_lists_and_structs(tmp_path):
    about = pyarrow.array([{"truth": 0.1}], pyarrow.struct([("truth", pyarrow.float32())]))
    choices = pyarrow.array([[0.1, 0.7]], pyarrow.list_(pyarrow.float32()))
    table = pyarrow.table({"prompt": ["q"], "about": about, "choices": choices})
    (record,) = read(tmp_path, table, columns={"answer": "about.truth"})
    assert (record.answer, record.choices) == ("0.1", ("0.1", "0.7"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.1), "0.1"),
        (np.float64(0.1), "0.1"),
        (np.int64(7), "7"),
        (decimal.Decimal("1.50"), "1.50"),
        (decimal.Decimal("1E+2"), "100"),
    ],
)
def test_numbers_in_memory(value, expected):
    assert load_rows([{"prompt": "q", "answer": value}])[0].answer == expected


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), np.float32("inf"), np.float64("nan"), decimal.Decimal("NaN")]
)
@pytest.mark.parametrize("field", ["answer", "id", "choices"])
def test_what_is_no_number_is_no_answer(value, field):
    row = {"prompt": "q", "answer": "1", field: [value] if field == "choices" else value}
    with pytest.raises(UserError, match=f"{field} is {str(value).lower()}, not a number"):
        load_rows([row])


def test_a_whole_number_that_no_float_holds_is_an_answer(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "answer": 10**400, "id": -(10**400)}) + "\n")
    (record,) = load_records(str(tmp_path / "rows.jsonl"))
    assert (record.answer, record.id) == ("1" + "0" * 400, "-1" + "0" * 400)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400 + ".0", "NaN", "-Infinity"])
def test_a_json_number_that_no_float_holds(tmp_path, number):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "q", "answer": {number}}}\n')
    with pytest.raises(UserError, match=r"not a number|is not a JSON number"):
        load_records(str(tmp_path / "rows.jsonl"))
    (tmp_path / "text.jsonl").write_text(f'{{"prompt": "q", "answer": "{number}"}}\n')
    assert load_records(str(tmp_path / "text.jsonl"))[0].answer == number


@pytest.mark.parametrize(
    "media",
    [
        {"videos": ["v.mp4"]},
        {"video": "v.mp4"},
        {"video": {"bytes": b"0", "path": None}},
        {"audio": {"array": [0.0], "sampling_rate": 8000}},
        {"audios": ["a.wav"]},
        {"videos": [["frame.png"]], "images": [picture(1)]},
    ],
)
def test_media_that_no_model_is_shown(media):
    name = next(iter(media))
    with pytest.raises(UserError, match=f"row 1: column '{name}' holds {name.rstrip('s')}, which no model sees"):
        load_rows([{"prompt": "What happens?", "answer": "a", **media}])


@pytest.mark.parametrize("empty", [None, [], "", {"bytes": None, "path": None}, [None]])
def test_no_media_are_no_media(empty):
    assert len(load_rows([{"prompt": "q", "answer": "a", "videos": empty, "audio": empty}])) == 1


def test_deeply_nested_media(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "q", "answer": "a", "videos": {"[" * 900}{"]" * 900}}}\n')
    with pytest.raises(UserError, match="holds video"):
        load_records(str(tmp_path / "rows.jsonl"))


def test_rows_with_a_video_are_named(tmp_path, capsys):
    from cppo.cli.main import main

    rows = [{"prompt": "q", "answer": "a", "videos": ["v.mp4"]}, {"prompt": "p", "answer": "a", "videos": []}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--max_bad_fraction", "0.5"]) == 0
    assert "bad row 1  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda path: pyarrow.parquet.write_table(pyarrow.table({"prompt": [], "answer": []}), path),
            "there are no rows",
        ),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_bytes(b"PAR1 and nothing else"), "magic bytes not found"),
        (lambda path: path.write_text("<!DOCTYPE html>" * 9), "magic bytes not found"),
        (lambda path: cut(path), "magic bytes not found"),
        (lambda path: flip(path), "cannot be read: (?!An error occurred)"),
    ],
)
def test_the_reason_of_an_unreadable_table_is_told(tmp_path, make, reason):
    path = tmp_path / "rows.parquet"
    make(path)
    with pytest.raises(UserError, match=reason) as caught:
        load_records(str(path))
    assert str(path) in str(caught.value)
    assert "An error occurred while generating" not in str(caught.value)
    assert "\n" not in str(caught.value)


def cut(path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q" * 99], "answer": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q" * 999] * 99, "answer": ["a"] * 99}), path)
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["cat", "kitten"], '["cat", "kitten"]'),
        (["cat"], "cat"),
        ([5, 5.5], '["5", "5.5"]'),
        (("caf\u00e9", 'a "b"'), '["caf\u00e9", "a \\"b\\""]'),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_a_list_of_accepted_answers(value, expected):
    assert load_rows([{"prompt": "q", "answer": value}])[0].answer == expected


@pytest.mark.parametrize("value", [[], [[]], ["a", None], ["a", " "], {"a": 1}, [float("nan")]])
def test_what_is_no_list_of_answers(value):
    with pytest.raises(UserError, match="answer"):
        load_rows([{"prompt": "q", "answer": value}])


def test_data_check_names_answers_that_are_not_plain(tmp_path, capsys):
    from cppo.cli.main import main

    plain = ["5", "x < 3", "[1, 2]", "A", "\\frac{1}{2}", "(-1, 3]", "a # b", "5 > 3 < 4"]
    wrapped = [
        "<answer>5</answer>",
        "3 + 4 = 7\n#### 7",
        ["a", "b"],
        "['a', 'b']",
        "because\nso 5",
        "<|begin_of_box|>5",
    ]
    rows = [{"prompt": f"q{number}", "answer": answer} for number, answer in enumerate([*plain, *wrapped])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(tmp_path / "rows.jsonl")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("wrapped"))
    assert line.startswith("wrapped     6 answers are not plain (")
    assert line.endswith("line 13, ...")
    assert f"{tmp_path / 'rows.jsonl'} line 9, " in line
