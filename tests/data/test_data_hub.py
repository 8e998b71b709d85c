"""Data sets on the hub, through the real client, in the layouts in which well-known ones lie there."""

import io
import json
import os
import subprocess
import sys
import zipfile
from itertools import pairwise

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pictures import picture, png, same

from cppo.cli.main import main
from cppo.data import hub_dataset, load_records, load_rows, open_hub_table
from cppo.errors import UserError

IMAGE_LIST = datasets.List(datasets.Image())
TEXT = datasets.Value("string")


def parquet(rows, features=None):
    """The bytes of a Parquet file, with `datasets`' own description of the columns if there are features."""
    buffer = io.BytesIO()
    if features is None:
        pyarrow.parquet.write_table(pyarrow.table(rows), buffer)
    else:
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(buffer)
    return buffer.getvalue()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def card(**configs):
    """A README.md whose configurations have these {split: pattern}."""
    entries = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configs.items()
    ]
    return f"---\n{json.dumps({'license': 'mit', 'configs': entries})}\n---\n# Data\n".encode()


def virl39k():
    """As TIGER-Lab/ViRL39K: one table with lists of paths, one archive beside it, a card without configurations."""
    table = {
        "question": ["<image>\nWhat is A?", "<image><image>Which one?", "<image>\nWhat is B?"],
        "answer": ["\\boxed{3}", "\\boxed{B}", "\\boxed{5}"],
        "image": [["images/q-0-0.png"], ["images/q-1-0.png", "images/q-1-1.png"], ["images/q-0-0.png"]],
        "qid": ["q-0", "q-1", "q-2"],
        "category": ["a", "b", "a"],
        "PassRate_32BTrained": [0.5, 1.0, 0.0],
    }
    images = {f"images/q-{seed // 2}-{seed % 2}.png": png(seed) for seed in range(4)}
    readme = b"---\nlicense: mit\n---\n# Overview"
    return {"README.md": readme, "39Krelease.parquet": parquet(table), "images.zip": zipped({"images/": b"", **images})}


def test_virl39k_as_it_lies(hub):
    """The archive is fetched and unpacked once, and the paths lead into it."""
    files = virl39k()
    hub.add("TIGER-Lab/ViRL39K", files)
    for _ in range(2):
        source = load_records("hub:TIGER-Lab/ViRL39K:train", columns="virl39k")
        assert [record.id for record in source] == ["q-0", "q-1", "q-2"]
        same(source[1].images, 2, 3)
        same(source[2].images, 0)
        assert source[0].answer == "\\boxed{3}"
    assert [len(hub.downloads(path)) for path in files] == [1, 1, 1]
    (folder,) = (path for path in (hub.cache / "assets").glob("cppo/images/default/*") if path.is_dir())
    assert len(list(folder.rglob("*.png"))) == 4
    with pytest.raises(UserError, match=r"no split 'test'.*choose one of train"):
        load_records("hub:TIGER-Lab/ViRL39K:test", columns="virl39k")


def test_geometry3k_as_it_lies(hub):
    """Three splits of shards; its choices stand beside the question and not in it, so they are no options."""
    features = {"images": IMAGE_LIST, "problem": TEXT, "answer": TEXT, "id": datasets.Value("int64")}
    features |= {"choices": datasets.List(TEXT), "ground_truth": TEXT}
    files = {"README.md": card(default={name: f"data/{name}-*" for name in ("train", "validation", "test")})}
    for seed, name in enumerate(("train", "validation", "test")):
        rows = {"images": [[picture(seed)]], "problem": ["<image>Find x."], "answer": [str(seed)], "id": [seed]}
        rows |= {"choices": [["0", "1", "2", "3"]], "ground_truth": ["A"]}
        files[f"data/{name}-00000-of-00001.parquet"] = parquet(rows, features)
    hub.add("hiyouga/geometry3k", files)
    for seed, name in ((0, "train"), (2, "test")):
        (record,) = load_records("hub:hiyouga/geometry3k", split=name, columns="geometry3k")
        assert (record.answer, record.id, record.choices) == (str(seed), str(seed), None)
        same(record.images, seed)
    (record,) = load_records("hub:hiyouga/geometry3k:validation", columns="geometry3k")
    assert record.answer == "1"
    assert not hub.downloads("images.zip")


def test_mmk12_as_it_lies(hub):
    """One image a row, in several shards, of which the hub's other splits are not fetched."""
    features = {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": datasets.Image()}

    def shard(*seeds):
        rows = {"id": [f"m{seed}" for seed in seeds], "question": [f"Question {seed}?" for seed in seeds]}
        rows |= {"answer": ["A" for _ in seeds], "subject": ["math" for _ in seeds], "image": list(map(picture, seeds))}
        return parquet(rows, features)

    files = {f"data/train-0000{part}-of-00003.parquet": shard(2 * part, 2 * part + 1) for part in range(3)}
    files["data/test-00000-of-00001.parquet"] = shard(9)
    hub.add("FanqingM/MMK12", files)
    source = load_records("hub:FanqingM/MMK12:train", columns="mmk12")
    assert [record.id for record in source] == [f"m{seed}" for seed in range(6)]
    same([record.images[0] for record in source], *range(6))
    assert not hub.downloads("data/test-00000-of-00001.parquet")


@pytest.mark.parametrize("newer", [False, True])
def test_papos_copy_of_virl39k_as_it_lies(hub, newer):
    """Images inside the table: as the published card has it, and as a newer one, with ids and plain structs."""
    rows = {"problem": ["<image>Find x.", "<image>Find y."], "answer": ["1", "2"]}
    if newer:
        rows |= {"id": ["a", "b"], "images": [[{"bytes": png(seed), "path": None}] for seed in (1, 2)]}
        table = parquet(rows)
    else:
        rows |= {"images": [[picture(1)], [picture(2)]]}
        table = parquet(rows, {"images": IMAGE_LIST, "problem": TEXT, "answer": TEXT})
    files = {"README.md": card(default={"train": "data/train-*"}), "data/train-00000-of-00001.parquet": table}
    hub.add("PAPOGalaxy/PAPO_ViRL39K_train", files)
    source = load_records("hub:PAPOGalaxy/PAPO_ViRL39K_train", columns="papo")
    same([record.images[0] for record in source], 1, 2)
    assert [record.answer for record in source] == ["1", "2"]


def test_configurations(hub):
    rows = {name: parquet({"prompt": [name], "answer": ["1"]}) for name in ("vision", "standard (4 options)")}
    patterns = {name: {"test": f"{name}/test-*"} for name in rows}
    files = {f"{name}/test-00000-of-00001.parquet": data for name, data in rows.items()}
    hub.add("org/name", {"README.md": card(**patterns), **files})
    for name in rows:
        (record,) = load_records(f"hub:org/name:test?config={name}")
        assert record.prompt == name
    with pytest.raises(UserError, match=r"write \?config=NAME at its end, NAME one of vision, standard"):
        load_records("hub:org/name:test")
    with pytest.raises(UserError, match="no configuration 'visio': did you mean `vision`"):
        load_records("hub:org/name:test?config=visio")


def test_other_kinds_of_tables(hub):
    """JSON, JSON lines and separated values, split by their card or by their names."""
    rows = [{"q": f"{number}?", "gold": str(number)} for number in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    separated = "".join("\t".join(row.values()) + "\n" for row in [{"q": "q", "gold": "gold"}, *rows]).encode()
    card = b"---\nconfigs:\n- data_files:\n  - {split: testmini, path: '*.json'}\n---\n"
    hub.add("org/json", {"README.md": card, "testmini.json": json.dumps(rows).encode(), "dataset_info.json": b"{}"})
    hub.add("org/lines", {"train.jsonl": lines[:-20], "val.jsonl": lines})
    hub.add("org/tsv", {"all.tsv": separated})
    found = [
        open_hub_table("org/json", split="testmini"),
        open_hub_table("org/lines", split="validation"),
        open_hub_table("org/tsv"),
    ]
    for table in found:
        assert [{name: str(cell) for name, cell in row.items()} for row in table.rows()] == rows
        assert table.folder is None
    assert len(load_rows(found[0].rows(), columns={"prompt": "q", "answer": "gold"})) == 3


def test_images_of_one_column_beside_a_json_file(hub):
    """What a benchmark's loader does: its own column of paths, below the table's folder."""
    table = json.dumps([{"question": "q", "answer": "A", "image_path": "pictures/1.png"}]).encode()
    hub.add("org/name", {"data/test.json": table, "data/pictures.zip": zipped({"pictures/1.png": png(1)})})
    found = open_hub_table("org/name", split="test", images=["image_path"])
    rows = load_rows(found.rows(), folder=found.folder, columns={"prompt": "question", "images": "image_path"})
    same(rows[0].images, 1)
    assert open_hub_table("org/name", split="test").folder is None


def test_an_interrupted_download_goes_on(hub):
    files = virl39k()
    noise = {"images/noise.bin": os.urandom(11_000_000)}  # the client keeps what it has by pieces of 10 MiB
    files["images.zip"] = zipped({**{f"images/q-{n // 2}-{n % 2}.png": png(n) for n in range(4)}, **noise})
    hub.add("TIGER-Lab/ViRL39K", files)
    hub.drop_once("images.zip", after=10_600_000)
    same(load_records("hub:TIGER-Lab/ViRL39K", columns="virl39k")[1].images, 2, 3)
    assert [request.range for request in hub.downloads("images.zip")] == ["", "bytes=10485760-"]


def test_a_folder_in_the_names_place(hub, tmp_path, monkeypatch):
    """The files as they were downloaded, the archive packed or unpacked; nothing is asked of the hub."""
    for path, data in virl39k().items():
        (tmp_path / path).write_bytes(data)
    monkeypatch.chdir(tmp_path.parent)
    for name in (f"hub:./{tmp_path.name}:train", f"hub:{tmp_path}"):
        source = load_records(name, columns="virl39k")
        same(source[1].images, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["39Krelease.parquet", "README.md", "images.zip"]
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "images.zip").unlink()
    same(load_records(f"hub:{tmp_path}", columns="virl39k")[1].images, 2, 3)
    assert hub.requests == []
    with pytest.raises(UserError, match="there is no folder"):
        load_records(f"hub:{tmp_path / 'other'}")


def test_without_a_network(hub, monkeypatch, refused):
    """One line says what to fetch and where to put it; what the cache holds is read."""
    hub.add("TIGER-Lab/ViRL39K", virl39k())
    load_records("hub:TIGER-Lab/ViRL39K", columns="virl39k")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    same(load_records("hub:TIGER-Lab/ViRL39K", columns="virl39k")[1].images, 2, 3)
    line = refused("data", "check", "hub:org/some-data:train", "--columns", "virl39k")
    assert "the hub cannot be reached" in line
    assert "`hf download org/some-data --repo-type dataset --local-dir ./some-data`" in line
    assert "write hub:./some-data:train in its place" in line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same(load_records("hub:TIGER-Lab/ViRL39K", columns="virl39k")[1].images, 2, 3)


def test_some_shards_are_not_all(hub):
    rows = parquet({"prompt": ["q"], "answer": ["a"]})
    hub.add("org/name", {"data/train-00000-of-00002.parquet": rows})
    with pytest.raises(UserError, match="found 1 of 2 files of data/train"):
        load_records("hub:org/name")


def test_what_is_not_there(hub):
    hub.add("org/name", {"README.md": b"# Nothing", "train.bin": b"\xff"})
    with pytest.raises(UserError, match="'hub:org/name': it has no tables"):
        load_records("hub:org/name")
    with pytest.raises(UserError, match="the hub has no data set 'org/other'"):
        load_records("hub:org/other")
    table = json.dumps({"prompt": "q", "answer": "a", "image": "a.png"}).encode()
    hub.add("org/loose", {"train.jsonl": table, "a.png": png(1)})
    with pytest.raises(UserError, match=r"'a\.png' is nowhere, and there is no \.zip.*write hub:\./FOLDER"):
        load_records("hub:org/loose")
    hub.add("org/wrong", {"train.jsonl": table, "images.zip": zipped({"b.png": png(1)})})
    with pytest.raises(UserError, match=r"'a\.png' is in none of images\.zip"):
        load_records("hub:org/wrong")


def test_paths_do_not_leave_the_archives(hub):
    table = "".join(
        json.dumps({"prompt": "q", "answer": "a", "image": path}) + "\n" for path in ("a.png", "/etc/passwd")
    )
    hub.add("org/name", {"train.jsonl": table.encode(), "images.zip": zipped({"a.png": png(1)})})
    source = load_records("hub:org/name", max_bad_fraction=0.5)
    assert len(source) == 1
    assert "leaves the folder" in source.skipped[0][1]


@pytest.mark.parametrize("path", ["a" * 300, "a/" * 400, "b\0.png", "../elsewhere.png", "loop/a.png"])
def test_odd_paths_are_bad_rows_beside_good_ones(tmp_path, path):
    """The odd path comes first, and decides nothing about where the images lie."""
    table = "".join(json.dumps({"prompt": "q", "answer": "a", "image": one}) + "\n" for one in (path, "a.png"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(table)
    (folder / "images.zip").write_bytes(zipped({"a.png": png(1)}))
    (tmp_path / "elsewhere.png").write_bytes(png(1))
    (folder / "loop").symlink_to("loop")
    source = load_records(f"hub:{folder}", max_bad_fraction=0.5)
    assert (len(source), len(source.skipped)) == (1, 1)


@pytest.mark.parametrize("file", ["train.jsonl", "images.zip", "README.md"])
def test_pointers_of_git_lfs_are_named(tmp_path, file):
    table = json.dumps({"prompt": "q", "answer": "a", "image": "a.png"})
    (tmp_path / "train.jsonl").write_text(table)
    (tmp_path / "images.zip").write_bytes(zipped({"a.png": png(1)}))
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(UserError, match=rf"{file}: is a pointer of Git LFS.*`git lfs pull`"):
        load_records(f"hub:{tmp_path}")


@pytest.mark.parametrize(
    "config",
    [
        "{config_name: *i, data_files: train.jsonl}, {config_name: b, data_files: c}",
        "{config_name: default, data_files: *i}",
        "{config_name: default, data_files: {train: *i}}",
        "{config_name: default, data_files: [{split: *i, path: *i}]}",
        "{config_name: default, data_dir: *i, data_files: '*.bin'}",
        "{config_name: default, data_files: 5}",
        "{config_name: default, data_files: [{path: {a: b}}]}",
    ],
)
def test_cards_that_grow_when_they_are_read(tmp_path, config):
    """Aliases of aliases: a few hundred characters of YAML stand for billions of values."""
    bomb = "a: &a [x]\n"
    for one, following in pairwise("abcdefghi"):
        bomb += f"{following}: &{following} [{','.join([f'*{one}'] * 10)}]\n"
    (tmp_path / "README.md").write_text(f"---\n{bomb}configs: [{config}]\n---\n")
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "q", "answer": "a"}))
    with pytest.raises(UserError, match=r"\?config=NAME|it has no tables") as caught:
        load_records(f"hub:{tmp_path}:train")
    assert len(str(caught.value)) < 1000


def test_file_names_of_a_repository_do_not_leave_it(hub):
    table = json.dumps({"prompt": "q", "answer": "a", "image": "a.png"}).encode()
    good = zipped({"a.png": png(1)})
    hub.add("org/name", {"train.jsonl": table, "images.zip": good, "../../up.zip": good, "/tmp/up.zip": good})
    assert len(load_records("hub:org/name")) == 1
    assert not any("up.zip" in request.path for request in hub.requests)


def test_processes_unpack_once(hub):
    """Two processes at once, as ranks are: both read, one unpacked."""
    hub.add("TIGER-Lab/ViRL39K", virl39k())
    code = (
        "from cppo.data import archives, load_records\nreal = archives._unpack\n"
        "def unpack(*args):\n    print('unpacked')\n    real(*args)\narchives._unpack = unpack\n"
        "print(len(load_records('hub:TIGER-Lab/ViRL39K', columns='virl39k')[1].images))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted("".join(process.communicate()[0] for process in started).split())
    assert printed == ["2", "2", "unpacked"]


def test_the_command_line_reads_it(hub, capsys):
    hub.add("TIGER-Lab/ViRL39K", virl39k())
    assert main(["data", "check", "hub:TIGER-Lab/ViRL39K:train", "--columns", "virl39k"]) == 0
    assert "rows        3, 3 usable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "name"),
    [("hub:org/name:test?config=a b", "org/name"), ("hub:./name:test", None), ("hub:/a/b", None), ("a.jsonl", None)],
)
def test_the_name_on_the_hub(spec, name):
    assert hub_dataset(spec) == name
