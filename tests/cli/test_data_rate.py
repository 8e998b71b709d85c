"""`cppo data rate`, from end to end: a stopped rating resumes from its file, which takes no other ratings."""

import json

import pytest
from pictures import picture, write_rows

from cppo.cli.main import main
from cppo.data import load_records, ratings_of
from cppo.evaluation import Response


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [{"answer": str(number % 2)} for number in range(6)])


@pytest.fixture
def scripted(monkeypatch):
    """A model that answers 0 or 1; how many responses it was asked for, by call."""
    calls = []

    class Scripted:
        def answer(self, *given, **options):
            raise AssertionError("asks for responses without their probabilities")

        def sample(self, prompts, images, *, streams, **options):
            calls.append(len(prompts))
            draws = [stream.random(2) for stream in streams]
            return [Response(f"\\boxed{{{int(answer < 0.6)}}}", -float(logp)) for answer, logp in draws]

    monkeypatch.setattr("cppo.evaluation.load_model", lambda *args, **kwargs: (Scripted(), None))
    return calls


def command(data, out, *options, model="micro"):
    rate = ["data", "rate", "--data", data, "--out", out, "--model", model, "--device", "cpu", "--samples", "4"]
    return [*map(str, rate), *options]


def test_the_micro_model_rates_rows(tmp_path, capsys):
    """What is easy for it and hard for it differs by noise."""
    file, specs = tmp_path / "ratings.jsonl", ["tasks:digits?n=4", "tasks:digits?n=4&noise=200&seed=3"]
    argv = command(specs[0], file, "--max_new_tokens", "48")
    argv[argv.index(specs[0]) + 1 : argv.index(specs[0]) + 1] = [specs[1]]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    header, *lines = map(json.loads, file.read_text().splitlines())
    assert (header["cppo_ratings"], header["samples"], header["seed"], header["temperature"]) == (1, 4, 0, 1.0)
    assert len(lines) == 8
    clean, noisy = ([line["accuracy"] for line in half] for half in (lines[:4], lines[4:]))
    assert sum(clean) > sum(noisy)
    assert f"rated 8 rows, 4 answers each: {file}\n" in printed
    entropies = sorted(line["semantic_entropy"] for line in lines)
    assert f"semantic entropy          {entropies[0]:.3f} to {entropies[-1]:.3f} nats, quartiles" in printed
    assert f"{sum(one == 0 for one in clean + noisy)} rows are never answered right" in printed
    source = load_records(specs)
    ratings = ratings_of(source, str(file))
    assert [rating.accuracy for rating in ratings] == clean + noisy
    assert all(len(rating.answers) == rating.clusters for rating in ratings)
    shuffled = source.keep([5, 0])
    assert ratings_of(shuffled, str(file)) == [ratings[5], ratings[0]]


def test_a_stopped_rating_goes_on(data, tmp_path, scripted, monkeypatch, capsys):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert main(command(data, whole, "--batch_size", "8")) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    scripted.clear()
    assert main(command(data, part, "--batch_size", "8")) == 0
    assert part.read_bytes() == whole.read_bytes()
    assert scripted == [8, 8]
    monkeypatch.setattr("cppo.evaluation.load_model", None)  # where nothing is missing no model is loaded
    printed = capsys.readouterr().out
    assert main(command(data, part, "--limit", "5")) == 0
    assert capsys.readouterr().out != printed


def test_ratings_of_other_settings_are_refused(data, tmp_path, scripted, refused):
    file = tmp_path / "ratings.jsonl"
    assert main(command(data, file)) == 0
    before = file.read_bytes()

    def check(*options, words, rows=data, model="micro"):
        error = refused(*command(rows, file, *options, model=model))
        assert error.startswith("--out: ")
        assert words in error

    check("--samples", "5", words="ratings of other settings: samples was 4, now 5; give another file")
    check("--seed", "1", words="seed was 0, now 1")
    check("--temperature", "0.5", words="temperature was 1.0, now 0.5")
    check("--prompt_suffix", "Briefly.", words='prompt_suffix was null, now "Briefly."')
    text = (tmp_path / "rows.jsonl").read_text()
    other = tmp_path / "other.jsonl"
    other.write_text(text.replace("picture 5", "picture five"))
    check(words="data was", rows=str(other))
    assert file.read_bytes() == before
    picture(7, (56, 56)).save(tmp_path / "1.png")
    check(words=f"line 3 rates another row than {data} line 2: the data have changed")
    for foreign in ("my notes", '{"a": 1}\n', '{"cppo_eval": 1}\n'):
        file.write_text(foreign)
        check(words="was not written by cppo data rate")
        assert file.read_text() == foreign
    lines = before.decode().splitlines(keepends=True)
    for damage in ({"row": None}, {"semantic_entropy": -1.0}, {"semantic_entropy": "1"}, {"answers": 3}):
        file.write_text(lines[0] + json.dumps(json.loads(lines[1]) | damage) + "\n")
        check(words="line 2 is damaged")


def test_mistakes_are_found_before_the_model_is_loaded(data, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("cppo.evaluation.load_model", None)
    out = tmp_path / "ratings.jsonl"
    assert "--samples" in refused(*command(data, out, "--samples", "1"))
    assert "--temperature" in refused(*command(data, out, "--temperature", "0"))
    assert "--out: cannot write" in refused(*command(data, tmp_path / "gone" / "r.jsonl"))
    assert "--vllm_tensor_parallel_size needs --use_vllm" in refused(
        *command(data, out, "--vllm_tensor_parallel_size", "2")
    )
