"""`cppo train` and `cppo eval` from end to end on a tiny untrained model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from small_model import SHORT_RUN, SMALL

from cppo.assets.build import build_micro
from cppo.cli.main import main
from cppo.errors import UserError
from cppo.evaluation import CLEAN, EvalResult, ItemResult
from cppo.recipes import load_recipe
from cppo.runs.run import run_training
from cppo.runs.sources import load_sources

OPTIONS = {
    **SHORT_RUN,
    "data": "tasks:digits?n=8",
    "eval_data": "tasks:digits?n=8",
    "perception_gate": "none",
    "save_steps": 2,
    "max_steps": 3,
    "final_eval_samples": 4,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model, a recipe, and the run of `cppo train` on it."""
    folder = tmp_path_factory.mktemp("work")
    model = build_micro(folder / "model", **SMALL)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"model": str(model), **OPTIONS}))
    assert main(["train", "--config", str(folder / "tiny.yaml"), "--output_dir", str(folder / "run")]) == 0
    return folder


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_run_directory(workplace):
    run = workplace / "run"
    assert steps(run) == [1, 2, 3]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for metric in ("reward", "rewards/accuracy_reward/mean", "perception/cpl", "perception/entropy_removing"):
        assert isinstance(row[metric], float), metric
    assert (run / "checkpoint-2" / "trainer_state.json").is_file()
    assert (run / "model.safetensors").is_file()
    assert (run / "processor_config.json").is_file()
    assert "Example responses" in (run / "report.html").read_text()


def test_the_gain_is_what_training_brought(workplace, tmp_path, monkeypatch):
    conditions = {}

    def answer(trainer, source, label, *, condition=CLEAN, **options):
        conditions[label] = condition.name
        right = {"before": 1, "after": 3, "blank image": 0}[label]
        marks = [float(place < right) for place in range(len(source))]
        items = tuple(ItemResult(str(place), "", ("",), (mark,), (0.0,), 1) for place, mark in enumerate(marks))
        return EvalResult(items, 1, condition.name)

    monkeypatch.setattr("cppo.runs.run.answer_all", answer)
    options = {"output_dir": str(tmp_path), "max_steps": 1, "probe_steps": 0}
    recipe = load_recipe("train", str(workplace / "tiny.yaml"), options)
    result = run_training(recipe, load_sources(recipe))
    assert [found.accuracy for found in (result.before, result.after, result.blank)] == [0.25, 0.75, 0.0]
    assert result.gain.mean == 0.5
    assert conditions == {"before": "clean", "after": "clean", "blank image": "blank"}


def test_probes_show_the_same_items_each_time(workplace):
    probes = [json.loads(line) for line in (workplace / "run" / "probes.jsonl").read_text().splitlines()]
    assert [probe["step"] for probe in probes] == [0, 1, 2, 3]
    assert {probe["n"] for probe in probes} == {8}
    assert len({tuple(item["id"] for item in probe["items"]) for probe in probes}) == 1
    for item in probes[0]["items"]:
        assert item["images"][0].startswith("data:image/png;base64,")
        assert len(item["tokens"]) == len(item["score"]) == len(item["selected"]) == len(item["true_perception"]) > 0
    assert not any(item["images"] for probe in probes[1:] for item in probe["items"])
    assert "The same items over training" in (workplace / "run" / "report.html").read_text()


def test_samples_hold_one_flag_and_score_a_token(workplace):
    samples = [json.loads(line) for line in (workplace / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        assert len(sample["completion_tokens"]) == len(sample["perception"]) == len(sample["score"]) > 0
        assert sample["images"][0].startswith("data:image/png;base64,")
        assert isinstance(sample["prompt"], str)
        assert isinstance(sample["answer"], str)
    assert any(any(sample["perception"]) for sample in samples)


def test_the_summary(workplace):
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    for name in ("before", "after", "blank"):
        assert summary[name]["n"] == 4
        low, high = summary[name]["accuracy_ci95"]
        assert 0 <= low <= summary[name]["accuracy"] <= high <= 1
    assert set(summary["gain"]) == {"mean", "low", "high"}


def test_the_model_card(workplace):
    card = ModelCard.load(workplace / "run" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers")
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    for label, name in (("before training", "before"), ("after training", "after"), ("after, grey image", "blank")):
        found = summary[name]
        low, high = (f"{100 * end:.1f}" for end in found["accuracy_ci95"])
        assert f"| {label} | {100 * found['accuracy']:.1f} % | [{low}, {high}] |" in card.text
    assert "8 rows to train on; 0 unusable rows were skipped" in card.text
    assert str(workplace) not in card.text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
    saved = yaml.safe_load((workplace / "run" / "config.yaml").read_text())
    kept = {name: value for name, value in saved.items() if name not in ("output_dir", "report_to")}
    assert yaml.safe_load(recipe) == {**kept, "model": "model"}


def test_a_readme_of_ones_own_is_not_overwritten(workplace, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# My project")
    assert main(["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path)]) == 2
    assert "holds files that no run wrote (README.md)" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# My project"


def test_the_resolved_recipe_runs_again_as_it_is(workplace):
    again = load_recipe("train", str(workplace / "run" / "config.yaml"))
    assert {name: again.config[name] for name in OPTIONS if name in again.config} == {
        name: value for name, value in OPTIONS.items() if name in again.config
    }
    assert again.config["perception_weight"] == 0.01
    assert again.config["reward_weights"] == [0.9, 0.1]


def test_closing_lines(workplace, capsys, tmp_path):
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--max_steps", "1", "--method", "grpo"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "held-out", "before", "after", "blank", "format", "model", "report",
    ]  # fmt: skip
    assert re.fullmatch(r"before +[\d.]+ %  \[[\d.]+, [\d.]+\]", lines[1])
    assert lines[-1].endswith(str(tmp_path / "run" / "report.html"))
    assert "step 1/1" in captured.err


def test_resuming_continues_the_metrics(workplace, tmp_path):
    run = shutil.copytree(workplace / "run", tmp_path / "run")
    argv = ["train", "--config", str(run / "config.yaml"), "--output_dir", str(run), "--final_eval_samples", "0"]
    assert main([*argv, "--resume_from_checkpoint", str(run / "checkpoint-2"), "--max_steps", "4"]) == 0
    assert steps(run) == [1, 2, 3, 4]
    probes = [json.loads(line)["step"] for line in (run / "probes.jsonl").read_text().splitlines()]
    assert probes == [0, 1, 2, 3, 4]
    assert not {"resume_from_checkpoint", "quiet"} & yaml.safe_load((run / "config.yaml").read_text()).keys()


def test_a_value_that_only_the_trainer_refuses(workplace, refused, tmp_path):
    argv = ["train", "--config", workplace / "tiny.yaml", "--output_dir", tmp_path / "run"]
    error = refused(*argv, "--generation_batch_size", 8, "--steps_per_generation", 2)
    assert "'generation_batch_size' and 'steps_per_generation'" in error


def test_eval_writes_one_json_object(workplace, capsys, tmp_path):
    file = tmp_path / "figures.json"
    argv = ["eval", "--model", str(workplace / "model"), "--data", "tasks:digits?n=9", "--limit", "5"]
    assert main([*argv, "--max_new_tokens", "4", "--blank", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["n"] == 5
    assert 0 <= figures["accuracy_ci95"][0] <= figures["accuracy"] <= figures["accuracy_ci95"][1] <= 1
    assert 0 <= figures["format_rate"] <= 1
    assert 0 <= figures["blank_accuracy"] <= 1
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["items", "accuracy", "blank", "format"]


def test_eval_takes_the_runs_system_prompt_and_length(workplace, tmp_path):
    recipe = yaml.safe_load((workplace / "tiny.yaml").read_text()) | {
        "system_prompt": "Think.",
        "prompt_suffix": "Then answer.",
        "min_side": 70,
        "max_completion_length": 3,
        "final_eval_samples": 0,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    assert main(["train", "--config", str(tmp_path / "tiny.yaml"), "--max_steps", "1", "--output_dir", str(run)]) == 0
    file = tmp_path / "figures.json"
    argv = ["eval", "--model", str(run), "--data", "tasks:digits?n=2", "--json", str(file)]
    assert main([*argv, "--samples", "2"]) == 0
    figures = json.loads(file.read_text())
    assert figures["max_new_tokens"] == 3
    asked = ["--max_new_tokens", "2", "--responses", str(tmp_path / "responses.jsonl")]
    assert main([*argv, *asked]) == 0
    assert json.loads(file.read_text())["max_new_tokens"] == 2
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()[1:]]
    assert [line["prompt"].endswith(" Then answer.") for line in lines] == [True, True]
    assert figures["system_prompt"] == "Think."
    assert (figures["prompt_suffix"], figures["min_side"]) == ("Then answer.", 70)
    assert figures["samples"] == 2


def test_a_stopped_run_names_its_last_checkpoint(workplace, tmp_path, capsys, monkeypatch):
    def stop(recipe, sources, report, checkpoint):
        for step in (4, 12):
            (tmp_path / "run" / f"checkpoint-{step}").mkdir()
            (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").touch()
        (tmp_path / "run" / "checkpoint-16").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("cppo.runs.run.run_training", stop)
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 130
    error = capsys.readouterr().err
    assert str(tmp_path / "run" / "checkpoint-12") in error
    assert "--resume_from_checkpoint" in error
    assert error.endswith("cppo: stopped\n")


def test_a_run_stopped_before_its_first_checkpoint_says_so(workplace, tmp_path, capsys, monkeypatch):
    def stop(recipe, sources, report, checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr("cppo.runs.run.run_training", stop)
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 130
    error = capsys.readouterr().err
    assert f"there is no checkpoint in {tmp_path / 'run'} yet" in error
    assert error.endswith("cppo: stopped\n")


def test_sft_fills_a_run_directory(workplace, tmp_path, capsys):
    recipe = {
        "model": str(workplace / "model"),
        "data": "tasks:digits?n=8",
        "max_steps": 2,
        **{name: OPTIONS[name] for name in ("use_cpu", "bf16", "gradient_checkpointing")},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    argv = ["sft", "--config", str(tmp_path / "sft.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    assert steps(tmp_path / "run") == [1, 2]
    assert "Token accuracy" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert load_recipe("sft", str(tmp_path / "run" / "config.yaml")).config["max_steps"] == 2
    capsys.readouterr()
    assert main(argv) == 2
    assert "finished run" in capsys.readouterr().err


def test_what_would_train_nothing_is_refused(workplace, tmp_path, capsys):
    few = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path / "few")]
    assert main([*few, "--data", "tasks:digits?n=1", "--final_eval_samples", "0"]) == 2
    assert "1 usable rows are fewer than the" in capsys.readouterr().err
    shutil.copytree(workplace / "run", tmp_path / "run")
    done = tmp_path / "run" / "checkpoint-3"
    again = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*again, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 2
    assert "is at step 3 already; raise max_steps" in capsys.readouterr().err
    assert done.is_dir()


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (["--reward_weights", "0.5"], "reward_weights: 1 weight (0.5) for 2 rewards (accuracy, format): add 1 weight"),
        (["--remove_unused_columns"], "remove_unused_columns = true removes the images and answers"),
        (["--loss_type", "foo"], "--loss_type: 'foo' is unknown; choose one of grpo, "),
        (["--report_to", "wandb"], "wandb"),
    ],
)
def test_what_the_libraries_refuse_is_one_line(workplace, tmp_path, capsys, option, part):
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path / "run"), *option]
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cppo: error")]
    assert len(error) == 1
    assert part in error[0]


def test_rewards_of_ones_own(workplace, tmp_path, capsys, monkeypatch):
    """A file's function, an async one and TRL's are logged by name; the saved recipe names them, and trains again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def brevity(completions, **kwargs):\n    return [0.25 for _ in completions]\n\n"
        "async def later(completions, **kwargs):\n    return [0.5 for _ in completions]\n"
    )
    rewards = ["accuracy?tolerance=0.1", "own.py:brevity", "own.py:later", "repetition?ngram_size=2"]
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--max_steps", "1", "--final_eval_samples", "0"]
    assert main([*argv, "--output_dir", "run", "--rewards", *rewards, "--reward_weights", "1", "2", "4", "0"]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["rewards/brevity/mean"] == 0.25
    assert row["rewards/later/mean"] == 0.5
    assert -1 <= row["rewards/repetition_penalty_reward/mean"] <= 0
    assert row["reward"] == pytest.approx(row["rewards/accuracy_reward/mean"] + 2 * 0.25 + 4 * 0.5)
    assert load_recipe("train", "run/config.yaml").options.rewards == rewards
    capsys.readouterr()
    figures = tmp_path / "figures.json"
    assert main(["eval", "--model", "run", "--data", "tasks:digits?n=2", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["tolerance"] == 0.1


def test_columns_under_the_names_of_a_file(workplace, tmp_path, monkeypatch, capsys):
    """Each completion is rewarded by its own row's cells, as they stand there; evaluation reads what training read."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "held_out"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
        rows = [{"q": f"{n}?", "images": f"{name}.png", "solution": n, "weight": {"of": n}} for n in range(8)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("own.py").write_text(
        "def own(completions, solution, answer, trainer_state, weight=(), scale=0.5, **kwargs):\n"
        "    for one, cell, text in zip(solution, weight, answer, strict=True):\n"
        "        assert cell == {'of': one} and text == str(one)\n"
        "    return [scale * one for one in solution]\n"
    )
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", "run", "--rewards", "own.py:own"]
    argv += ["--data", "data.jsonl", "--eval_data", "held_out.jsonl", "--columns", "{prompt: q, answer: solution}"]
    assert main([*argv, "--max_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--eval_limit", "4"]) == 0
    trained, evaluated = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][
        :2
    ]
    assert 0 < trained["rewards/own/mean"] <= 3.5
    assert 0 < evaluated["eval_rewards/own/mean"] <= 3.5
    asked = ["--data", "held_out.jsonl", "--limit", "2", "--device", "cpu"]
    assert main(["eval", "--model", "run", *asked, "--json", "as_trained.json"]) == 0
    report = json.loads(Path("as_trained.json").read_text())
    assert report["columns"] == {"prompt": "q", "answer": "solution"}
    capsys.readouterr()
    assert main(["eval", "--model", "run", *asked, "--columns", "{}"]) == 2
    assert "columns 'prompt'" in capsys.readouterr().err
    assert main(["eval", "--model", "run", "--data", "gone.jsonl"]) == 2
    assert capsys.readouterr().err.endswith("there is no such file\n")
    Path("other.jsonl").write_text('{"prompt": "1?", "answer": 1}\n')
    assert main(["inspect", "--model", "run", "--data", "other.jsonl", "--out", "page.html"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "columns 'q'" in line
    assert "--columns {} reads without" in line


def test_own_rewards_are_tried_before_a_model_is_loaded(tmp_path, monkeypatch):
    """They get what training would pass; None is a reward; an async one is let be."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(
        "def good(completions, prompts, completion_ids, level, answer, images, trainer_state, log_metric, **kwargs):\n"
        "    assert [one['type'] for one in prompts[0][-1]['content']] == ['image', 'text']\n"
        "    assert completions[0][-1]['content'].endswith(f'{{{answer[0]}}}') and level[0] == 1\n"
        "    assert {len(one) for one in (prompts, completion_ids, level, answer, images)} == {len(completions)}\n"
        "    log_metric('x', 0.5 + trainer_state.global_step / trainer_state.max_steps)\n"
        "    return [None] * len(completions)\n\n"
        "def short(completions, **kwargs):\n    return [0.5]\n\n"
        "async def later(completions, **kwargs):\n    return [0.5]\n"
    )

    def sources(reward):
        return load_sources(load_recipe("train", "micro", {"rewards": [reward]}))

    assert [sources(f"own.py:{name}").rewards[0].__name__ for name in ("good", "later")] == ["good", "later"]
    with pytest.raises(UserError, match=r"'own.py:short' must return a list of 2 numbers.*returned 1 \(tried on the"):
        sources("own.py:short")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rewards", "acuracy"], "'acuracy' is unknown; did you mean `accuracy`? choose one of accuracy, format"),
        (["--rewards", "accuracy", "--reward_weights", "1", "2"], "2 weights (1, 2) for 1 reward (accuracy)"),
        (["--rewards", "gone.py:f"], "there is no file gone.py"),
        (["--rewards", "json:dumps"], "no row has the column 'obj'"),
        (["--rewards", "own.py:of_length"], "no row has the columns 'length', 'width'; the rows have 'family'"),
        (["--rewards", "own.py:of_length"], "needed by the parameters of reward 'own.py:of_length'"),
        (["--rewards", "own.py:of_file"], "'own.py:of_file' failed in own.py line 5: ZeroDivisionError"),
    ],
)
def test_mistakes_in_rewards(workplace, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def of_length(completions, length, width, **kwargs):\n    return [0.0 for _ in completions]\n\n"
        "def of_file(completions, **kwargs):\n    return [1 / 0]\n"
    )
    argv = ["train", "--config", str(workplace / "tiny.yaml"), "--output_dir", str(tmp_path / "run"), *options]
    assert main([*argv, "--final_eval_samples", "0"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cppo: error")]
    assert len(error) == 1
    assert words in error[0]
