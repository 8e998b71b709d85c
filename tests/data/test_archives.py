"""Archives that are not trusted: what is refused, how much is unpacked, and that nothing half unpacked is kept."""

import stat
import subprocess
import sys
import zipfile

import pytest

from cppo.data import archives
from cppo.data.archives import unpacked
from cppo.errors import UserError


def member(name, data=b"x", **fields):
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(tmp_path, *members, name="images.zip"):
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as file:
        for info, data in members:
            file.writestr(info, data)
    return path


def kind(of):
    """The part of a zip entry that says which kind of file it is."""
    return {"create_system": 3, "external_attr": (of | 0o777) << 16}


def left(cache):
    return [path for path in cache.rglob("*") if path.suffix != ".lock"]


def test_members_lie_where_unzip_leaves_them(tmp_path):
    members = [member("images/", b""), member("images/a.png", b"1"), member("./b.png", b"2"), member("é/c.png", b"3")]
    other = archive(tmp_path, member("d.png", b"4"), name="more.zip")
    folder = unpacked({"images.zip": archive(tmp_path, *members), "part/more.zip": other}, tmp_path / "cache")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"images/a.png": b"1", "b.png": b"2", "é/c.png": b"3", "part/d.png": b"4"}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (member("../a.png"), "leaves the folder"),
        (member("images/../../a.png"), "leaves the folder"),
        (member("/etc/a.png"), "leaves the folder"),
        (member("..\\a.png"), "leaves the folder"),
        (member("../", b""), "leaves the folder"),
        (member("a.png", b"/etc/passwd", **kind(stat.S_IFLNK)), "a link"),
        (member("images/", b"", **kind(stat.S_IFLNK)), "a link"),
        (member("a.png", **kind(stat.S_IFCHR)), "a device"),
        (member("a.png", **kind(stat.S_IFBLK)), "a device"),
        (member("a.png", **kind(stat.S_IFIFO)), "a pipe"),
        (member("a.png", **kind(stat.S_IFSOCK)), "no plain file"),
        (member("a.png", compress_type=zipfile.ZIP_LZMA), "not compressed by deflate"),
        (member("ok.png"), "'ok.png' twice"),
        (member("ok.png/a.png"), "'ok.png' twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_may_not_be_unpacked(tmp_path, wrong, reason):
    """One wrong member, and nothing of the archive is kept."""
    path = archive(tmp_path, member("ok.png"), wrong)
    with pytest.raises(UserError, match=reason) as caught:
        unpacked({"images.zip": path}, tmp_path / "cache" / "images")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left(tmp_path / "cache") == [tmp_path / "cache" / "images"]
    assert not (tmp_path / "a.png").exists()


def test_limits_hold_over_all_archives(tmp_path, monkeypatch):
    both = {
        "a.zip": archive(tmp_path, *(member(f"{n}", bytes(1000)) for n in range(3)), name="a.zip"),
        "b.zip": archive(tmp_path, *(member(f"b{n}", bytes(1000)) for n in range(3)), name="b.zip"),
    }
    for name, limit in (("MAX_UNPACKED_FILES", 6), ("MAX_UNPACKED_BYTES", 6000)):
        with monkeypatch.context() as patch:
            patch.setattr(archives, name, limit)
            unpacked(both, tmp_path / f"{name} kept")
            patch.setattr(archives, name, limit - 1)
            with pytest.raises(UserError, match=f"more than {limit - 1:,} "):
                unpacked(both, tmp_path / name)
            assert left(tmp_path / name) == []


def test_what_is_written_counts_not_what_the_header_says(tmp_path, monkeypatch):
    """A bomb whose directory claims a small size is stopped: by its true bytes, or by its checksum."""
    path = archive(tmp_path, member("a.png", bytes(5_000_000)))
    data = bytearray(path.read_bytes())
    sizes = [place for place in range(len(data)) if data[place : place + 4] == (5_000_000).to_bytes(4, "little")]
    assert len(sizes) == 2
    for place in sizes:
        data[place : place + 4] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 100)
    with pytest.raises(UserError, match="is broken; fetch it again"):
        unpacked({"images.zip": path}, tmp_path / "cache")
    assert left(tmp_path / "cache") == []
    # The honest one is stopped while it is written.
    with pytest.raises(UserError, match="more than 100 bytes"):
        unpacked({"images.zip": archive(tmp_path, member("a.png", bytes(5_000_000)))}, tmp_path / "cache")


def test_broken_archives(tmp_path):
    whole = archive(tmp_path, member("a.png", bytes(range(256)) * 40)).read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 255
    for number, data in enumerate((b"", b"PK", b"<html>", whole[:-30], whole[30:], bytes(flipped))):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        with pytest.raises(UserError, match="fetch it again") as caught:
            unpacked({path.name: path}, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert left(tmp_path / "cache") == []


def test_a_full_disk_is_one_line(tmp_path):
    """Here: a limit on the size of files, which fails a write as a full disk does."""
    path = archive(tmp_path, member("a.png", bytes(2_000_000)))
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom cppo.data.archives import unpacked\n"
        "from cppo.errors import UserError\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000000, 1000000))\n"
        "try:\n    unpacked({'images.zip': Path(sys.argv[1])}, Path(sys.argv[2]))\n"
        "except UserError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code, path, tmp_path / "cache"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{path}: cannot be unpacked into {tmp_path / 'cache'}: ")
    assert said.count("\n") == 1
    assert left(tmp_path / "cache") == []


def test_encrypted_members(tmp_path):
    path = archive(tmp_path, member("a.png"))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        unpacked({"images.zip": path}, tmp_path / "cache")


def test_a_killed_process_leaves_nothing_that_passes_for_whole(tmp_path):
    """Killed after the first of two files; the next process begins anew."""
    path = archive(tmp_path, member("a.png", b"1"), member("b.png", b"2"))
    code = (
        "import os, sys, zipfile\nfrom pathlib import Path\nfrom cppo.data import archives\n"
        "real = zipfile.ZipFile.open\n"
        "def opened(self, info, *rest):\n"
        "    if info.filename == 'b.png':\n        os.kill(os.getpid(), 9)\n"
        "    return real(self, info, *rest)\n"
        "zipfile.ZipFile.open = opened\n"
        "archives.unpacked({'images.zip': Path(sys.argv[1])}, Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, path, tmp_path / "cache"], check=False)
    assert done.returncode == -9
    assert [one.name for one in left(tmp_path / "cache") if one.is_file()] == ["a.png"]
    folder = unpacked({"images.zip": path}, tmp_path / "cache")
    assert sorted(one.name for one in folder.iterdir()) == ["a.png", "b.png"]
    assert [one for one in (tmp_path / "cache").iterdir() if one.is_dir()] == [folder]


def test_a_changed_archive_is_unpacked_again(tmp_path):
    first = unpacked({"images.zip": archive(tmp_path, member("a.png", b"1"))}, tmp_path / "cache")
    again = unpacked({"images.zip": tmp_path / "images.zip"}, tmp_path / "cache")
    other = unpacked({"images.zip": archive(tmp_path, member("a.png", b"123"))}, tmp_path / "cache")
    assert first == again
    assert (other / "a.png").read_bytes() == b"123"


def test_unpacking_shows_how_far_it_is(tmp_path, noted_progress):
    path = archive(tmp_path, member("a", bytes(2 << 20)), member("b", bytes(2 << 20)))
    unpacked({"images.zip": path}, tmp_path / "cache")
    assert noted_progress[-1].startswith("unpack images.zip: 100 %, 4.19MB of 4.19MB, ")
    assert any(line.startswith("unpack images.zip: 50 %, 2.10MB of 4.19MB, ") for line in noted_progress)
