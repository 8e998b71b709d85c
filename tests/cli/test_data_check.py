"""`cppo data check`: exactly the rows that cannot be used, and what the others hold."""

import io
import json
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from cppo.cli.main import main

EVERY = 20
"""One row in so many is bad: 5 %."""


def bomb():
    """A PNG of a few bytes whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def oddities(folder):
    """Valid images of unusual kinds."""
    Image.new("CMYK", (9, 7), (10, 20, 30, 40)).save(folder / "cmyk.jpg")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 5), "green").save(folder / "rotated.jpg", exif=exif)
    Image.new("L", (1, 1), 7).save(folder / "dot.png")
    return ["cmyk.jpg", "animated.gif", "rotated.jpg", "dot.png"]


def corrupt(folder):
    """{kind: change of a row}, with the files it takes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    (folder / "truncated.png").write_bytes(buffer.getvalue()[:2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_bytes(b"these are words")
    (folder / "bomb.png").write_bytes(bomb())
    images = ["truncated.png", "empty.png", "words.png", "bomb.png", "gone.png"]
    outside = ["../outside.png", str(folder.parent / "outside.png"), "file:cmyk.jpg", "http://host/a.png", "link.png"]
    noise.save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    changes = {name: {"images": [name]} for name in images + outside}
    return changes | {"no answer": {"answer": None}, "no prompt": {"prompt": None}}


@pytest.fixture
def thousand(tmp_path):
    """1,000 rows, 50 of them bad; the bad ones' line numbers with what is wrong."""
    folder = tmp_path / "data"
    folder.mkdir()
    good, bad = oddities(folder), corrupt(folder)
    rows, expected = [], {}
    for line in range(1, 1001):
        image = good[line % 4]
        row = {"prompt": f"Question {line % 900}?", "answer": "3" if line % 2 else "a cat", "images": [image]}
        if line % EVERY == 0:
            kind = list(bad)[line // EVERY % len(bad)]
            row |= bad[kind]
            expected[line] = kind
        rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, expected


def found_rows(text):
    return {int(number): reason for number, reason in re.findall(r"^bad row (\d+)  (.*)$", text, flags=re.MULTILINE)}


def test_exactly_the_corrupted_rows_are_found(thousand, capsys):
    path, expected = thousand
    assert main(["data", "check", str(path)]) == 1
    captured = capsys.readouterr()
    found = found_rows(captured.out)
    assert found.keys() == expected.keys()
    for line, kind in expected.items():
        assert found[line].startswith(f"{path}: ")
        assert kind.removeprefix("no ") in found[line], found[line]
    assert "rows        1,000, 950 usable, 50 bad (5.0 %)" in captured.out
    # 12 x 5 stands upright as 5 x 12.
    assert "sizes       1 x 1 to 8 x 8 pixels, median 5 x 12" in captured.out
    assert "500 number, 450 text" in captured.out
    assert "4 images occur in several rows" in captured.out
    assert "Traceback" not in captured.err
    assert main(["data", "check", str(path), "--max_bad_fraction", "0.05"]) == 0


def test_repetitions_and_overlap(tmp_path, capsys):
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("same-as-a.png", "red")):
        Image.new("RGB", (4, 4), color).save(tmp_path / name)
    train = [("q", "a.png"), ("q", "same-as-a.png"), ("r", "a.png"), ("q", "b.png"), ("q", None)]
    for name, rows in (("train", train), ("test", [("z", "same-as-a.png")])):
        lines = [{"prompt": prompt, "answer": "B", **({"images": image} if image else {})} for prompt, image in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["data", "check", str(tmp_path / "train.jsonl"), "--against", str(tmp_path / "test.jsonl")]
    assert main([*argv, "--model", "micro", "--max_prompt_tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "images      1 rows with 0, 4 rows with 1" in out
    assert "answers     5 option letter" in out
    assert "1 rows have the question and images of an earlier one; 1 images occur in several rows" in out
    assert "overlap     1 of 2 distinct images are also in" in out
    # 4x4 is scaled up to the processor's least size, 16 image tokens.
    assert "too long    5 rows of more than 5 prompt tokens" in out
    assert f"long row  {tmp_path / 'train.jsonl'} line 5: " in out


def test_nothing_usable(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "answer": "a", "image": "gone.png"}\n{"prompt": "", "answer": "a"}\n')
    assert main(["data", "check", str(path)]) == 1
    out = capsys.readouterr().out
    assert found_rows(out).keys() == {1, 2}
    assert "rows        2, none of them usable" in out


def test_mistakes(refused, tmp_path):
    for argv, words in (
        (["data"], "required: check"),
        (["data", "check"], "SPEC"),
        (["data", "check", "gone.jsonl"], "no such file"),
        (["data", "check", "tasks:digits", "--against", "tasks:nope"], "unknown task"),
        (["data", "check", "tasks:digits", "--max_prompt_tokens", "9"], "--max_prompt_tokens needs --model"),
        (["data", "check", "tasks:digits", "--model", str(tmp_path / "gone")], "there is no folder"),
    ):
        assert words in refused(*argv)


def test_looking_at_data_needs_no_torch(thousand):
    code = "import sys; from cppo.cli.main import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "data", "check", str(thousand[0])]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_choices_that_the_answer_is_none_of_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["red", "blue", "12 cm"]
    answers = ["B", "(a)", "Blue.", "c. 12 cm", "12 cm", "D", "green", "a. blue", "7"]
    rows = [{"prompt": f"{n}?", "answer": answer, "choices": options} for n, answer in enumerate(answers)]
    rows[-1].pop("choices")
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", "my.jsonl"]) == 0
    wrong = "my.jsonl line 6, my.jsonl line 7, my.jsonl line 8"
    assert f"choices     8 rows have them; the answer is none of them in 3: {wrong}\n" in capsys.readouterr().out
    assert main(["data", "check", "tasks:digits?n=2"]) == 0
    assert "choices" not in capsys.readouterr().out


def test_sizes_are_shown_within_the_bounds_too(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size in ((40, 10), (60, 60), (90, 40)):
        Image.new("RGB", size).save(f"{size[0]}.png")
    rows = [{"prompt": f"{n}?", "answer": "1", "images": f"{n}.png"} for n in (40, 60, 90)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", "my.jsonl", "--max_pixels", "900"]) == 0
    sizes = "sizes       40 x 10 to 90 x 40 pixels, median 60 x 60\n"
    assert sizes + "scaled      40 x 10 to 45 x 20 pixels, median 30 x 30\n" in capsys.readouterr().out
    assert main(["data", "check", "my.jsonl"]) == 0
    assert "scaled" not in capsys.readouterr().out
