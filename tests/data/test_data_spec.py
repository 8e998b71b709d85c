"""SPEC strings: what they mean, and the one line that a wrong one gives."""

import subprocess
import sys

import pytest

from cppo.data import load_records, parse_spec
from cppo.errors import UserError
from cppo.tasks import make_item, parse_task_options


def test_task_spec_gives_the_generated_items():
    source = load_records("tasks:digits?noise=90&seed=3&n=5&split=test", split="train")
    options = parse_task_options("digits", {"noise": "90"})
    assert len(source) == 5
    for index in range(5):
        item = make_item("digits", options, seed=3, index=index, split="test")
        record = source[index]
        assert (record.id, record.prompt, record.answer) == (item.id, item.prompt, item.answer)
        assert record.images[0].tobytes() == item.image.tobytes()
        assert record.response == item.response
        assert record.perception_spans == item.perception_spans


def test_reader_options_have_defaults():
    source = load_records("tasks:digits", split="test")
    expected = make_item("digits", parse_task_options("digits", {}), seed=0, index=1999, split="test")
    assert len(source) == 2000
    assert source[-1].id == expected.id
    with pytest.raises(IndexError):
        source[2000]


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("", "not a data source"),
        ("digits", "not a data source"),
        ("rows.json", "one JSON object a line"),
        ("missing.jsonl", "no such file"),
        (".", "not a folder written by `save_to_disk` of `datasets`"),
        ("rows.parquet", "no such file"),
        ("hub:name", "write hub:ORG/NAME"),
        ("hub:org/name:train:test", "write hub:ORG/NAME"),
        ("hub:org/name?confg=a", "write hub:ORG/NAME"),
        ("hub:../name", "there is no folder '../name'"),
        ("tasks:", "unknown task ''"),
        ("tasks:digit", "unknown task 'digit'"),
        ("tasks:digits?noise", "'noise' is not option=value"),
        ("tasks:digits?noise=", "'noise=' is not option=value"),
        ("tasks:digits?=4", "'=4' is not option=value"),
        ("tasks:digits?n=5&&seed=1", "'' is not option=value"),
        ("tasks:digits?n=5&n=6", "option 'n' is given twice"),
        ("tasks:digits?n=0", "n=0 must be a whole number of at least 1"),
        ("tasks:digits?n=1e3", "n=1e3 must be a whole number"),
        ("tasks:digits?seed=-1", "seed=-1 must be a whole number"),
        ("tasks:digits?split=validation", "split=validation is unknown"),
        ("tasks:digits?sed=9", "'sed'; did you mean `seed`? choose one of seed, n, split, noise, level, prior, ask"),
        ("tasks:digits?noise=loud", "noise=loud"),
    ],
)
def test_wrong_spec_is_one_line_that_names_the_mistake(spec, part):
    with pytest.raises(UserError) as caught:
        parse_spec(spec)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_spec_is_checked_before_any_is_read(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    with pytest.raises(UserError, match=r"missing\.jsonl.*no such file"):
        load_records([str(broken), str(tmp_path / "missing.jsonl")])


@pytest.mark.parametrize(
    ("specs", "options", "part"),
    [
        ([], {}, "no source"),
        ("tasks:digits", {"split": "dev"}, "split='dev'"),
        ("tasks:digits", {"limit": 0}, "limit=0"),
        ("tasks:digits", {"max_bad_fraction": 1.5}, "max_bad_fraction=1.5"),
        ("tasks:digits", {"columns": {"question": "prompt"}}, "'question' is unknown; choose one of prompt"),
        ("tasks:digits", {"columns": {"prompt": ""}}, "prompt must name a column"),
        (
            "tasks:digits",
            {"columns": "verl2"},
            "'verl2' is not a layout; did you mean `verl`? choose one of geometry3k",
        ),
        (["tasks:digits", "tasks:digits"], {}, "given twice"),
        (["tasks:digits?n=5", "tasks:digits?n=6&split=train"], {}, "the same items"),
    ],
)
def test_wrong_arguments(specs, options, part):
    with pytest.raises(UserError) as caught:
        load_records(specs, **options)
    assert part in str(caught.value)


def test_checking_a_spec_imports_nothing_heavy():
    code = (
        "import sys\nfrom cppo.data import parse_spec\nparse_spec('tasks:digits?noise=90')\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
