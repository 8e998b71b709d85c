"""Fields of a row: which values are read, which make the row bad and why, and how bad rows are counted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cppo.data import MissingColumns, load_records, load_rows
from cppo.errors import UserError


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def good_rows(count):
    return [{"prompt": f"How much is {i} + 0?", "answer": str(i)} for i in range(count)]


def bad_reason(row, **options):
    """The reason that one bad row among 100 good ones is skipped with."""
    source = load_rows([*good_rows(60), row, *good_rows(40)], **options)
    assert len(source) == 100
    ((number, reason),) = source.skipped
    assert number == 61
    return reason


def test_text_row_and_every_optional_field(tmp_path):
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "a.png")
    row = {
        "id": 7,
        "prompt": "Wie spät ist es? 時計を見て 🕒",
        "images": ["a.png"],
        "answer": 12,
        "response": "<think> 12 </think> \\boxed{12}",
        "perception_spans": [[8, 10]],
    }
    source = load_records(write_jsonl(tmp_path / "rows.jsonl", [row]))
    record = source[0]
    assert (record.id, record.prompt, record.answer) == ("7", "Wie spät ist es? 時計を見て 🕒", "12")
    assert [(image.mode, image.size, image.getpixel((0, 0))) for image in record.images] == [
        ("RGB", (3, 2), (10, 20, 30))
    ]
    assert record.response[slice(*record.perception_spans[0])] == "12"
    assert source.columns == ("prompt", "images", "answer", "sample_id", "response", "perception_spans")


@pytest.mark.parametrize("images", [{}, {"images": None}, {"images": []}, {"image": None}])
def test_text_only_rows_have_no_images(images):
    assert load_rows([{"prompt": "2 + 2?", "answer": "4", **images}])[0].images == ()


def test_image_column_and_several_images(tmp_path):
    for index, size in enumerate([(2, 3), (4, 5)]):
        Image.new("L", size).save(tmp_path / f"{index}.png")
    rows = [
        {"prompt": "one", "answer": "a", "image": "0.png"},
        {"prompt": "two", "answer": "b", "images": ["1.png", "0.png"]},
        {"prompt": "one path as images", "answer": "c", "images": "1.png"},
    ]
    source = load_records(write_jsonl(tmp_path / "rows.jsonl", rows))
    sizes = [[image.size for image in record.images] for record in source]
    assert sizes == [[(2, 3)], [(4, 5), (2, 3)], [(4, 5)]]


def test_column_mapping(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    row = {"question": "q", "picture": "a.png", "gt": 3.5, "key": "k", "image": "not looked at"}
    columns = {"prompt": "question", "images": "picture", "answer": "gt", "id": "key"}
    record = load_records(write_jsonl(tmp_path / "rows.jsonl", [row]), columns=columns)[0]
    assert (record.id, record.prompt, record.answer, len(record.images)) == ("k", "q", "3.5", 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {},
            "no row has the column 'answer'; the rows have 'prompt', 'gt', 'note': .*columns .{answer: THEIR",
        ),
        ({"answer": "truth"}, "no row has the column 'truth'"),
        (
            {"prompt": "question"},
            "no row has the columns 'question', 'answer'; .* --columns .{prompt: THEIR_NAME, answer: THEIR_NAME}",
        ),
        ({"answer": "gt", "images": "pictures"}, "no row has the column 'pictures'.*columns .{answer: gt, images: T"),
    ],
)
def test_column_that_no_row_has(tmp_path, columns, message):
    rows = [{"prompt": "a", "gt": "1"}, {"prompt": "b", "gt": "2", "note": "x"}]
    with pytest.raises(UserError, match=message):
        load_records(write_jsonl(tmp_path / "rows.jsonl", rows), columns=columns)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": None}, "column 'answer' is missing or null"),
        ({"answer": ""}, "answer is empty"),
        ({"answer": " \n"}, "answer is empty"),
        ({"answer": True}, "answer must be text, found true"),
        ({"answer": {"is": "4"}}, "answer must be text"),
        ({"prompt": None}, "column 'prompt' is missing or null"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "see <|image_pad|>"}, "prompt holds <|image_pad|>, a token for the model only; write <image> for"),
        ({"answer": "<|vision_start|>"}, "answer holds <|vision_start|>"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": 5}, "prompt must be text or a list of chat messages"),
        ({"prompt": []}, "prompt must be text or a list of chat messages"),
        ({"id": {}}, "id must be text"),
        ({"response": 3}, "response must be text"),
        ({"perception_spans": [[0, 1]]}, "perception_spans need a response"),
        ({"response": "abc", "perception_spans": [[0, 4]]}, "0 <= start < end <= 3"),
        ({"response": "abc", "perception_spans": [[2, 2]]}, "0 <= start < end <= 3"),
        ({"response": "abc", "perception_spans": [[-1, 2]]}, "0 <= start < end <= 3"),
        ({"response": "abc", "perception_spans": [[0.0, 2]]}, "0 <= start < end <= 3"),
        ({"response": "abc", "perception_spans": [1, 2]}, "0 <= start < end <= 3"),
        ({"image": b"1", "images": [b"2"]}, "both 'image' and 'images'"),
        ({"images": [3]}, "images must be file paths, found 3"),
        ({"images": [""]}, "images must be file paths"),
        ({"images": {"file": "a.png"}}, "images must be file paths"),
        ({"images": {"bytes": None, "path": None}}, "images must be file paths"),
        (
            {"prompt": "<image> and <image>?", "images": [Image.new("RGB", (2, 2))]},
            "2 image placeholders, but the row has 1 images",
        ),
        ({"prompt": "Which <image>?"}, "1 image placeholders, but the row has 0 images"),
        ({"images": ["a.png"]}, "these rows have no folder"),
    ],
)
def test_bad_values_are_skipped_with_their_reason(change, reason):
    assert reason in bad_reason({"prompt": "2 + 2?", "answer": "4", **change})


def test_chat_prompts():
    pixel = Image.new("RGB", (1, 1))
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    parts = [
        {"type": "text", "text": "Left:"},
        {"type": "image"},
        {"type": "text", "text": "right:"},
        {"type": "image"},
    ]
    source = load_rows(
        [
            {"prompt": plain, "answer": "a", "images": [pixel]},
            {
                "prompt": [plain[0], {"role": "user", "content": parts}],
                "answer": "b",
                "images": [pixel, pixel],
            },
        ]
    )
    assert source[0].prompt == plain
    # Placeholders in one message make parts of all text, so that TRL adds no image to another.
    assert source[1].prompt == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
    ]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (["text"], "each chat message needs a role"),
        ([{"role": "tool", "content": "x"}], "each chat message needs a role"),
        ([{"role": "user"}], "content of the user message must be text"),
        ([{"role": "user", "content": []}], "content of the user message must be text"),
        ([{"role": "user", "content": ""}], "content of the user message is empty"),
        ([{"role": "user", "content": [{"type": "video"}]}], "content parts are"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "the files go in images"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            "2 image placeholders.* 1 images",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "no place"}]}],
            "0 image placeholders.* 1 images",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "end with a user message",
        ),
    ],
)
def test_bad_chat_prompts(prompt, reason):
    row = {"prompt": prompt, "answer": "4", "images": [Image.new("RGB", (1, 1))]}
    with pytest.raises(UserError, match=reason):
        load_rows([row])


def test_lines_of_a_file(tmp_path):
    """A byte order mark, CRLF, blank lines and U+2028 inside text are all fine; numbers count every line."""
    path = tmp_path / "rows.jsonl"
    lines = [
        b'\xef\xbb\xbf{"prompt": "first", "answer": "1"}\r\n',
        b"\r\n",
        '{"prompt": "one\u2028two", "answer": "2"}\r\n'.encode(),
        b'{"prompt": "third", "answer": \r\n',
        b"   \n",
        b'{"prompt": "\xff", "answer": "x"}\n',
        b"[1, 2]\n",
        b'{"prompt": "NaN", "answer": NaN}\n',
        b"[" * 100_000 + b"\n",
        b'{"prompt": "last", "answer": "3"}',
    ]
    path.write_bytes(b"".join(lines))
    source = load_records(str(path), max_bad_fraction=0.7)
    assert [record.prompt for record in source] == ["first", "one\u2028two", "last"]
    assert [number for number, _ in source.skipped] == [4, 6, 7, 8, 9]
    parts = ["not valid JSON: Expecting value", "not UTF-8", "must be a JSON object", "NaN", "not valid JSON"]
    for (_, reason), part in zip(source.skipped, parts, strict=True):
        assert part in reason
        assert reason.startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf"])
def test_file_without_rows(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"rows\.jsonl: there are no rows"):
        load_records(str(path))


@pytest.mark.parametrize(
    ("good", "bad", "fraction", "accepted"),
    [
        (99, 1, 0.01, True),
        (98, 1, 0.01, False),
        (98, 2, 0.01, False),
        (600, 6, 0.01, True),
        (71, 29, 0.29, True),
        (9, 1, 0.01, False),
        (10, 0, 0.0, True),
        (1000, 1, 0.0, False),
        (1, 9, 1.0, True),
        (0, 9, 1.0, False),
    ],
)
def test_share_of_bad_rows(tmp_path, good, bad, fraction, accepted):
    rows = [*({"prompt": "?", "answer": ""} for _ in range(bad)), *good_rows(good)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    if accepted:
        source = load_records(path, max_bad_fraction=fraction)
        assert (len(source), len(source.skipped)) == (good, bad)
    else:
        with pytest.raises(UserError, match=rf"rows\.jsonl: {bad} of {good + bad} rows .* line 1: answer is empty"):
            load_records(path, max_bad_fraction=fraction)


@pytest.mark.parametrize(("bad", "fraction", "accepted"), [(1, 0.01, True), (2, 0.01, False), (1, 0.0, False)])
def test_one_bad_row_among_the_first_few_of_a_file_is_no_large_share(tmp_path, bad, fraction, accepted):
    path = write_jsonl(tmp_path / "rows.jsonl", [*({"prompt": "?", "answer": ""} for _ in range(bad)), *good_rows(500)])
    if accepted:
        assert len(load_records(path, limit=64, max_bad_fraction=fraction)) == 64
    else:
        with pytest.raises(UserError, match=f"{bad} of {64 + bad} rows"):
            load_records(path, limit=64, max_bad_fraction=fraction)


def test_limit_counts_good_rows_and_reads_no_further(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [{"prompt": "?", "answer": ""}, *good_rows(5)])
    second = tmp_path / "second.jsonl"
    second.write_text('{"prompt": "kept", "answer": "1"}\nnever parsed\n')
    source = load_records([first, str(second)], limit=6, max_bad_fraction=0.2)
    assert [record.prompt for record in source] == [row["prompt"] for row in good_rows(5)] + ["kept"]
    assert source.skipped == [(1, f"{first}: answer is empty")]
    assert len(load_records(["tasks:digits?n=4", first], limit=3)) == 3


def test_several_sources_are_concatenated(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", good_rows(3))
    source = load_records(["tasks:digits?n=2", path, "tasks:digits?n=2&seed=1"])
    ids = [record.id for record in source]
    assert len(source) == len(set(ids)) == 7
    assert [source[i].id for i in range(-7, 0)] == ids
    assert [record.id for record in source[1:6:2]] == ids[1:6:2]
    assert [record.prompt for record in source[2:5]] == [row["prompt"] for row in good_rows(3)]
    assert source.name == f"tasks:digits?n=2 + {path} + tasks:digits?n=2&seed=1"
    # The file's rows have no reference response, so the whole has no such column.
    assert source.columns == ("prompt", "images", "answer", "sample_id")
    with pytest.raises(IndexError):
        source[-8]


def test_ids_follow_content(tmp_path):
    image = Image.new("RGB", (2, 2), "red")
    rows = [{"prompt": f"question {i}", "answer": "a", "images": [image]} for i in range(3)]
    ids = [record.id for record in load_rows(rows)]
    assert len(set(ids)) == 3
    assert [record.id for record in load_rows(rows[::-1], name="another")] == ids[::-1]
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        image.save(tmp_path / folder / f"{folder}.png")
        row = {"prompt": "question 1", "answer": "other answer", "image": f"{folder}.png"}
        assert load_records(write_jsonl(tmp_path / folder / "rows.jsonl", [row]))[0].id == ids[1]
    blue = Image.new("RGB", (2, 2), "blue")
    assert load_rows([{**rows[1], "images": [blue]}])[0].id != ids[1]


def test_id_that_is_taken_makes_a_bad_row(tmp_path):
    rows = [{"prompt": "a", "answer": "1", "id": "x"}, {"prompt": "b", "answer": "2", "id": "y"}]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    second = write_jsonl(tmp_path / "second.jsonl", [{**rows[0], "id": "z"}, rows[1], {**rows[0], "id": "z"}])
    source = load_records([first, second], max_bad_fraction=0.7)
    assert [record.id for record in source] == ["x", "y", "z"]
    assert source.skipped == [
        (2, f"{second}: id 'y' is already used by {first} line 2"),
        (3, f"{second}: id 'z' is already used by {second} line 1"),
    ]


def test_the_documented_example_prints_what_it_says():
    text = (Path(__file__).parents[2] / "docs" / "train" / "data.md").read_text(encoding="utf-8")
    text = text.partition("## In Python")[2]
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", text, re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == printed, done.stderr


def test_columns_of_later_rows_count_where_the_reading_stops_early(tmp_path):
    """An optional column that only later rows fill is there; one of no row is not, however few are read."""
    file = tmp_path / "rows.jsonl"
    rows = [{"q": f"{n}?", "a": str(n), **({"options": ["x", "y"], "level": n} if n > 6 else {})} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "answer": "a", "choices": "options"}
    few = load_records(str(file), columns=columns, limit=2, extras=["level"], optional=["topic"])
    assert (len(few), few.extras(0), few.columns[-1]) == (2, {"level": None, "topic": None}, "level")
    every = load_records(str(file), columns=columns, optional=["level", "topic"])
    assert (every.extras(8)["level"], every.columns[-1]) == (8, "level")
    with pytest.raises(UserError, match="no row has the column 'colour'; the rows have 'q', 'a', 'options', 'level'"):
        load_records(str(file), columns={**columns, "id": "colour"}, limit=2)
    with pytest.raises(MissingColumns, match="no row has the columns 'topic', 'place'; the rows have 'q'"):
        load_records(str(file), columns=columns, limit=2, extras=["topic", "level", "place"])
