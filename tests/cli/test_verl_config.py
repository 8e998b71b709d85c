"""`cppo verl-config`: every option of a recipe reaches verl, or a line says what verl does instead."""

import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import verl_recipes
import yaml

from cppo.cli.main import main
from cppo.cli.verl_config import translation
from cppo.errors import UserError
from cppo.options import RATED_OPTIONS, schema
from cppo.verl import translate, versions
from cppo.verl.batches import Values
from cppo.verl.counterparts import (
    ACTOR,
    CUSTOM,
    IN_THE_DATA,
    INSTEAD,
    LATER,
    MODEL,
    NO_MEANING,
    ROLLOUT,
    SAME,
    without_meaning,
)

FIELDS = schema("train").fields
OTHER = {
    "baseline_memory": "[0.5, 0.9]",
    "data_accuracy_band": "[0.2, 0.8]",
    "data_confidence_band": "[0.2, 0.8]",
    "enable_jit_checkpoint": "false",
    "remove_unused_columns": "false",
    "activation_checkpointing_kwargs": "{every: 2}",
    "generation_kwargs": "{seed: 1}",
    "gradient_checkpointing_kwargs": "{use_reentrant: true}",
    "liger_kernel_config": "{rope: true}",
    "lr_scheduler_kwargs": "{min_lr: 0}",
    "optim": "sgd",
    "optim_target_modules": "all-linear",
    "require_sharing": "true",
    "scorer": "shared",
    "train_sampling_strategy": "sequential",
    "transformers_continuous_batching_config": "{a: 1}",
}
"""Values to give where `another` finds none that passes."""
BATCHING = {"use_transformers_continuous_batching": ["--per_device_generation_batch_size", "null"]}
TOGETHER = BATCHING | {"load_in_4bit": ["--use_peft"], "load_in_8bit": ["--use_peft"], "lora_dropout": ["--use_peft"]}
TOGETHER |= {name: ["--use_peft"] for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant")}
TOGETHER |= {name: ["--data_ratings", "ratings.jsonl"] for name in RATED_OPTIONS}


def another(name):
    """A value of an option unlike its default, as a word."""
    field = FIELDS[name]
    if name in OTHER:
        return OTHER[name]
    if field.choices:
        return next(str(choice) for choice in field.choices if choice != field.default)
    if "bool" in field.kinds:
        return str(not field.default).lower()
    if field.kinds & {"int", "float"}:
        return "0.5" if "int" not in field.kinds else "7"
    return "{a: 1}" if "dict" in field.kinds and "str" not in field.kinds else "something"


def remarks(*words):
    """The options of the lines that say what verl does instead, each with its line."""
    lines = translation([*words]).instead
    return {line.partition(" = ")[0]: line for line in lines}


def test_the_tables_share_out_the_options():
    tables = [list(SAME), list(INSTEAD), " ".join(NO_MEANING.values()).split(), list(IN_THE_DATA)]
    named = [name for table in tables for name in table]
    assert len(named) == len(set(named))
    assert set(named) <= {*FIELDS, *LATER}


def test_an_option_that_nobody_thought_of_is_found(monkeypatch):
    """Such as one that a later TRL adds: it is in no table, and no rule reads it."""
    monkeypatch.delitem(INSTEAD, "tf32")
    assert not [line for line in translation([]).instead if line.startswith("tf32")]
    assert remarks("--tf32", "true")["tf32"].startswith("tf32 = True: verl is not told of it")


def test_every_option_is_in_a_table_or_read_by_a_rule(monkeypatch):
    made = []

    class Kept(Values):
        def __init__(self, values):
            super().__init__(values)
            made.append(self)

    monkeypatch.setattr(translate, "Values", Kept)
    translation([])
    (values,) = made
    assert set(values) == values.read | set(without_meaning())


@pytest.mark.parametrize("name", [name for name in (*INSTEAD, *without_meaning()) if name in FIELDS])
def test_an_option_without_counterpart_is_told(name):
    word = another(name)
    line = remarks(f"--{name}", word, *TOGETHER.get(name, []))[name]
    assert re.fullmatch(rf"{name} = .+: .{{10,}}", line)


def test_the_file_for_the_tests_inside_verl_is_what_the_command_makes():
    assert verl_recipes.FILE.read_text(encoding="utf-8") == verl_recipes.written()


def test_the_rows_are_those_of_the_recipe():
    (train,) = translation(["--config", "cppo-3b", "--columns", "{prompt: q}"]).data
    assert train[0] == "hub:TIGER-Lab/ViRL39K:train"
    given = dict(zip(train[1::2], train[2::2], strict=True))
    assert yaml.safe_load(given.pop("--columns")) == {"prompt": "q"}
    assert r"\boxed{}" in given.pop("--prompt_suffix")
    assert given == {
        "--split": "train",
        "--min_side": "28",
        "--images_per_row": "1",
        "--out": "runs/cppo-3b/train.parquet",
    }


def test_the_published_batch_on_any_number_of_gpus():
    for nodes in (1, 2, 4):
        found = translation(["--config", "cppo-3b", "--nodes", str(nodes)]).options
        assert found["data.train_batch_size"] == 512
        assert found[f"{ACTOR}.ppo_mini_batch_size"] == 64
        assert found[f"{ROLLOUT}.n"] == 5
        assert found["trainer.nnodes"] * found["trainer.n_gpus_per_node"] == 8 * nodes
        # 248 steps of 64 prompts are 31 generation batches of 512
        assert found["trainer.save_freq"] == 31


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--loss_type luspo", "loss_type = 'luspo': verl has no such loss"),
        ("--loss_type bnpo", "loss_type = 'bnpo': a mean over the tokens of a step"),
        ("--model micro", "model = 'micro': transformers before 5.11 ignores"),
        (
            "--scale_rewards batch",
            "scale_rewards = 'batch': advantages are divided by their group's standard deviation",
        ),
        ("--loss_type cispo --importance_sampling_level sequence", "importance_sampling_level = 'sequence': verl's"),
        ("--lr_scheduler_type linear", "lr_scheduler_type = 'linear': verl has constant and cosine"),
        ("--save_steps 100", "save_steps = 100: verl counts generation batches of 8 steps: 13"),
        ("--save_steps 0.1", "save_steps = 0.1: verl accepts no fraction of a run"),
        ("--max_prompt_tokens null", "max_prompt_tokens = None: verl needs a limit"),
        ("--num_train_epochs 1.5", "num_train_epochs = 1.5: verl counts whole epochs: 2"),
        ("--report_to neptune", "report_to = 'neptune': verl's loggers are"),
        ('--model_init_kwargs {"revision":1}', "model_init_kwargs = {'revision': 1}: verl uses only its dtype"),
        ("--nonfinite stop", "nonfinite = 'stop': a step with a gradient that is not finite is skipped"),
    ],
)
def test_what_verl_does_otherwise_is_told(words, told):
    assert [line for line in translation(words.split()).instead if line.startswith(told)]
    assert not [line for line in translation([]).instead if line.startswith(told)]


def test_a_group_of_rows_fits_the_budget():
    """A rollout and its two views, each of the longest prompt and response."""
    words = ["--max_prompt_tokens", "700", "--max_completion_length", "300"]
    assert translation(words).options[f"{ACTOR}.ppo_max_token_len_per_gpu"] == 3 * (700 + 300)


def test_only_what_the_method_does_not_set_is_given():
    def own(*words):
        found = translation([*words]).options
        return {name.removeprefix(f"{CUSTOM}."): value for name, value in found.items() if name.startswith(CUSTOM)}

    assert own() == {"method": "cppo", "seed": 42}
    assert own("--perception_weight", "0.01") == own()  # the method's own value
    assert own("--method", "papo", "--perception_weight", "0.04", "--seed", "7") == {
        "method": "papo",
        "perception_weight": 0.04,
        "seed": 7,
    }
    assert own("--preserving_views", "rotation")["preserving_views"] == ["rotation"]
    assert own("--view_threads", "6") == {"method": "cppo", "seed": 42, "view_threads": 6}


def test_what_is_printed_runs(tmp_path, monkeypatch, capsys):
    """The commands that write the data do; the file holds what the command line would."""
    monkeypatch.chdir(tmp_path)
    words = ["verl-config", "--data", "tasks:digits?n=4", "--eval_data", "tasks:digits?n=3", "--output_dir", "out"]
    assert main(words) == 0
    printed = capsys.readouterr()
    folder, *data, start = re.split(r"\n(?=cppo |python )", printed.out.replace("\\\n", " ").strip())
    subprocess.run(shlex.split(folder), check=True)
    train, test = map(shlex.split, data)
    for command, rows in ((train, 4), (test, 3)):
        assert command[0] == "cppo"
        assert main(command[1:]) == 0
        assert capsys.readouterr().out.startswith(f"rows        {rows};")
    found = dict(word.split("=", 1) for word in shlex.split(start)[3:])
    assert Path(found["data.train_files"]).is_file()
    assert Path(found["data.val_files"]).is_file()
    assert shlex.split(start)[:3] == ["python", "-m", "cppo.verl"]
    assert all(line.startswith("cppo: not in verl: ") for line in printed.err.splitlines())

    file = tmp_path / "options.yaml"
    assert main([*words, "--out", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"python -m cppo.verl --config {file}"
    assert yaml.safe_load(file.read_text()) == dict(translation(words[1:]).options)
    assert file.read_text().count("# not in verl: ") == len(translation(words[1:]).instead)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--method vppo", "method = 'vppo' cannot run inside verl"),
        ("--method cppo --perception_divergence kl", "perception_divergence = 'kl'"),
        ("--config cppo-paper", "would depend on verl's mini-batches: use 'rollout', or train with `cppo train`"),
        ("--rewards accuracy length?max_completion_len=9&soft_punish_cache=3", "is TRL's"),
        ("--method vision-sr1", "needs ask_policy, which verl's reward workers do not have"),
        ("--trained_answers description_reward", "trained_answers = 'description_reward' asks the policy"),
        ("--method perception-r1", "'word_repetition?ngram_size=20' is TRL's"),
        ("--rewards facts --reward_weights 1", "facts_reward needs facts, but `cppo verl-data` writes only"),
        ("--model_init_kwargs x", "model_init_kwargs: expected a mapping"),
        ("--chat_template_kwargs x", "chat_template_kwargs: expected a mapping"),
        ("--num_generations null", "num_generations: verl needs a number"),
        ("--max_completion_length null", "max_completion_length: verl needs a number"),
        ("--method cppo-correct-gate --perception_gate_reward acuracy_reward", "did you mean `accuracy_reward`"),
        ("--final_eval_samples 5", "evaluation needs `eval_data`"),
        ("--gpus_per_node 7", "7 GPUs cannot share"),
        ("--gradient_accumulation_steps 3", "give a multiple of gradient_accumulation_steps"),
        ("--num_generations 3", "must be a multiple of"),
        ("--mode async", "choose one of sync, colocate_async, separate_async"),
        ("--nodez 2", "unknown option `--nodez`; did you mean"),
        ("--out nowhere/file.yaml", "there is no such folder"),
    ],
)
def test_mistakes_are_one_line(words, told, refused):
    assert told in refused("verl-config", *words.split())


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is not valid JSON"), ("[]", "has no vision tower"), ('{"vision_config": [1]}', None)],
)
def test_a_models_broken_configuration_is_one_line(text, told, tmp_path, refused):
    (tmp_path / "config.json").write_text(text)
    if told is None:
        assert translation(["--model", str(tmp_path)]).options[f"{MODEL}.path"] == str(tmp_path)
    else:
        assert told in refused("verl-config", "--model", str(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        "--save_strategy no",
        "--fp16 true --bf16 false",
        "--config micro-sft",
        "--config cppo-paper --perception_normalization rollout",
    ],
)
def test_options_that_others_make_idle_are_no_mistake(words):
    assert translation(words.split()).options


# Versions, of which nothing is imported


@pytest.fixture
def environment(monkeypatch):
    """An environment of these versions beside verl's real requirements: {package: version, or None for missing}."""

    def set_up(**found):
        held = {"verl": "0.9.1", "transformers": "5.10.4", "tensordict": "0.10.0", "TransferQueue": "0.1.11"} | found
        needs = ["transformers!=5.6.0,<5.11,>=5.5.3", "tensordict<=0.10.0,>=0.8.0", 'vllm==0.24.0; extra == "vllm"']
        own = {"verl": needs, "cppo": ["trl>=1.16,<1.17", "transformers>=5.17", "pint>=0.24.4,<0.26"]}
        held.setdefault("qwen-vl-utils", "0.0.14")
        held.setdefault("pint", "0.25.3")
        held.setdefault("cppo", "0.1.0")

        def installed(name):
            return held.get(name)

        monkeypatch.setattr(versions, "installed", installed)
        monkeypatch.setattr(versions, "requires", own.get)

    return set_up


def test_versions_that_go_together_pass(environment):
    environment()
    versions.check_versions()


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"verl": None}, "verl is not installed here"),
        ({"verl": "0.8.0"}, "verl>=0.9,<0.10, but verl 0.8.0 is installed"),
        ({"verl": "0.10.0"}, "but verl 0.10.0 is installed"),
        ({"transformers": "5.24.0"}, "verl 0.9.1 needs transformers!=5.6.0,<5.11,>=5.5.3, but transformers 5.24.0"),
        ({"transformers": "5.6.0"}, "but transformers 5.6.0 is installed"),
        ({"tensordict": None}, "needs tensordict, which is not installed: pip install 'tensordict"),
        ({"TransferQueue": None}, "needs TransferQueue, which is not installed: pip install 'TransferQueue>=0.1.10'"),
        ({"pint": None}, "cppo needs pint, which is not installed"),
        ({"pint": "0.26"}, "but pint 0.26 is installed"),
    ],
)
def test_versions_that_do_not_are_one_line(environment, found, told):
    environment(**found)
    with pytest.raises(UserError) as caught:
        versions.check_versions()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_installed_is_looked_up():
    assert versions.installed("trl") == version("trl")
    assert versions.installed("no-such-package") is None
