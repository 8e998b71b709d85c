"""How often images are decoded, how many pixels at once, and what a long check shows."""

import json
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest
from pictures import picture, png
from PIL import Image

import cppo.data.images
from cppo.cli.main import main
from cppo.data import load_records, load_rows, summarize
from cppo.views.room import PixelRoom


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded to pixels, one entry each time."""
    found, real = [], cppo.data.images.load_rgb

    def load_rgb(image):
        found.append(image.size)
        return real(image)

    monkeypatch.setattr(cppo.data.images, "load_rgb", load_rgb)
    return found


def write_rows(folder, files, rows):
    for number in range(files):
        picture(number).save(folder / f"{number}.png")
    lines = [{"prompt": f"q{row}", "answer": "a", "images": [f"{row % files}.png"]} for row in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


def test_data_check_decodes_each_file_once(tmp_path, decoded, capsys):
    path = write_rows(tmp_path, files=4, rows=600)
    assert main(["data", "check", path]) == 0
    assert len(decoded) == 4
    assert "4 images occur in several rows" in capsys.readouterr().out
    decoded.clear()
    assert main(["data", "check", path, "--against", path]) == 0
    assert len(decoded) == 8


@pytest.mark.parametrize("kind", ["table", "memory"])
def test_equal_images_inside_rows_are_decoded_once(tmp_path, decoded, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": f"q{row}", "answer": "a", "image": png(row % 3)} for row in range(300)]
    if kind == "memory":
        assert len(load_rows(rows)) == 300
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        found = summarize(load_records(str(tmp_path / "rows.parquet"), with_facts=True))
        assert (len(found.images), found.shared_images, found.sizes) == (3, 3, [(8, 6)] * 300)
    assert len(decoded) == 3


def test_a_summary_does_not_depend_on_when_the_facts_were_noted(tmp_path):
    path = write_rows(tmp_path, files=3, rows=5)
    noted = summarize(load_records(path, with_facts=True))
    assert noted == summarize(load_records(path))
    in_memory = [{"prompt": f"q{row}", "answer": "a", "image": picture(row % 3)} for row in range(5)]
    assert noted.images == summarize(load_rows(in_memory)).images
    assert summarize(load_records("tasks:digits?n=4")).images_a_row == {1: 4}


@pytest.mark.parametrize(
    ("sizes", "most"),
    [([(10, 10)] * 6, 2), ([(20, 10)] * 4, 1), ([(30, 30)] * 3, 1), ([(1, 1)] * 8, 8), ([(10, 10), (11, 10)] * 3, 1)],
)
def test_threads_work_on_so_many_pixels_at_once(sizes, most):
    """A room of 200 pixels; an image of more than that goes in alone."""
    room, lock, at_work, peak = PixelRoom(200), threading.Lock(), [], []

    def work(size):
        with room.taken(size):
            with lock:
                at_work.append(size)
                peak.append(len(at_work))
            time.sleep(0.02)
            with lock:
                at_work.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(peak) == len(sizes)
    assert max(peak) <= max(most, 200 // min(width * height for width, height in sizes))
    assert max(peak) <= most or sizes[0] != sizes[1]


def test_an_error_gives_the_room_back():
    room = PixelRoom(10)
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), room.taken((5, 5)):
            raise ValueError("x")
    with room.taken((5, 5)):
        pass


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """Two pictures of 16 megapixels in small files: together they are more than the room holds."""
    at_work, peak, real = [], [], cppo.data.images.load_rgb

    def load_rgb(image):
        at_work.append(image.size)
        peak.append(len(at_work))
        time.sleep(0.01)
        done = real(image)
        at_work.pop()
        return done

    monkeypatch.setattr(cppo.data.images, "load_rgb", load_rgb)
    for number in range(3):
        Image.new("L", (4000, 4000), number).save(tmp_path / f"{number}.png")
    rows = [{"prompt": f"q{number}", "answer": "a", "image": f"{number}.png"} for number in range(3)]
    assert len(load_rows(rows, folder=tmp_path)) == 3
    assert max(peak) == 1


def test_a_long_check_shows_how_far_it_is(tmp_path, noted_progress):
    path = write_rows(tmp_path, files=2, rows=100)
    load_records(path)
    said = [line.removeprefix(f"check {path}: ").rpartition(",")[0] for line in noted_progress]
    assert said == ["64 %, 64 of 100 rows", "100 %, 100 of 100 rows"]
