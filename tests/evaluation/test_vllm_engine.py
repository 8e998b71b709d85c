"""What vLLM is given, by a stand-in that records it. `benchmarks/vllm_agreement.py` runs the real one."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image

from cppo.cli.main import main
from cppo.errors import UserError
from cppo.evaluation import load_processor
from cppo.evaluation.vllm_engine import own_environment, own_gpus

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, importable as `vllm`."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("stand_in")))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    import vllm

    yield vllm
    del sys.modules["vllm"]


@pytest.fixture(scope="module")
def model(small_model, tmp_path_factory):
    """The untrained model with the rotary base of published vision towers; no test changes it."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["rope_parameters"]["rope_theta"] = 10_000.0
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A row with one picture, one with two and one with none; the second answer is wrong."""
    for number in range(3):
        picture(number, (64, 64)).save(tmp_path / f"{number}.png")
    rows = [
        {"id": "one", "prompt": "sum top ?", "images": ["0.png"], "answer": "7"},
        {"id": "two", "prompt": "which is more ?", "images": ["1.png", "2.png"], "answer": "8"},
        {"id": "none", "prompt": "3 + 4 ?", "images": [], "answer": "7"},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def evaluate(model, data, *options):
    return main(["eval", "--model", model, "--data", data, "--use_vllm", "--dtype", "float32", *map(str, options)])


def test_prompts_are_not_expanded_and_images_go_beside_them(vllm, model, data, tmp_path):
    file = tmp_path / "figures.json"
    assert evaluate(model, data, "--json", file, "--system_prompt", "Look.") == 0
    expected = [f"{IMAGE}sum top ?", f"{IMAGE}{IMAGE}which is more ?", "3 + 4 ?"]
    assert [prompt["prompt"] for prompt, _ in vllm.asked] == [
        f"<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in expected
    ]
    shown = [prompt.get("multi_modal_data") for prompt, _ in vllm.asked]
    assert shown[2] is None
    pictures = [np.asarray(Image.open(tmp_path / f"{number}.png")) for number in range(3)]
    for given, expected in ((shown[0], pictures[:1]), (shown[1], pictures[1:])):
        np.testing.assert_array_equal([np.asarray(image) for image in given["image"]], expected)
    figures = json.loads(file.read_text())
    assert figures["accuracy"] == pytest.approx(2 / 3, abs=1e-12)
    assert figures["format_rate"] == 1.0


def test_greedy_parameters_and_the_engines_own(vllm, model, data):
    options = ["--max_new_tokens", 9, "--vllm_tensor_parallel_size", 2, "--vllm_gpu_memory_utilization", 0.5]
    assert evaluate(model, data, *options, "--vllm_max_model_length", 300) == 0
    (engine,) = vllm.engines
    assert engine["model"] == model
    assert (engine["dtype"], engine["tensor_parallel_size"]) == ("float32", 2)
    assert (engine["gpu_memory_utilization"], engine["max_model_len"]) == (0.5, 300)
    tokenizer = load_processor(model).tokenizer
    one = vllm.asked[0][1]
    assert (one.temperature, one.top_p, one.top_k, one.max_tokens) == (0.0, 1.0, 0, 9)
    assert one.repetition_penalty == 1.0
    assert one.stop_token_ids == [tokenizer.eos_token_id]
    banned = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    assert set(banned) <= set(one.logit_bias)
    assert set(one.logit_bias.values()) == {-100.0}
    # Qwen's template begins with no token of its own: the tokenizer is left to add what it adds.
    assert vllm.tokenizations == [{"add_special_tokens": True}]


def test_seeds_depend_on_row_and_sample_alone(vllm, model, data):
    def seeds(*options):
        vllm.asked.clear()
        assert evaluate(model, data, "--samples", 3, "--temperature", 0.7, "--top_p", 0.9, *options) == 0
        assert all((one.temperature, one.top_p) == (0.7, 0.9) for _, one in vllm.asked)
        return [one.seed for _, one in vllm.asked]

    first = seeds()
    assert len(set(first)) == 9
    assert all(0 <= seed < 2**63 for seed in first)
    assert seeds("--batch_size", 3) == first
    assert seeds("--limit", 1) == first[:3]
    assert not set(seeds("--seed", 1)) & set(first)


def test_responses_of_two_engines_do_not_mix(vllm, model, data, tmp_path, refused):
    file = tmp_path / "responses.jsonl"
    assert evaluate(model, data, "--responses", file) == 0
    assert len(file.read_text().splitlines()) == 4
    again = ["eval", "--model", model, "--data", data, "--dtype", "float32", "--responses", file]
    assert 'engine was "vllm", now null' in refused(*again)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vllm_max_model_length", "9"], "--vllm_max_model_length needs --use_vllm"),
        (["--use_vllm", "--device", "cuda:1"], "leave it out with --use_vllm"),
        (["--use_vllm", "--vllm_tensor_parallel_size", "3"], "cannot be loaded by vLLM: too few GPUs"),
        (["--use_vllm", "--system_prompt", "too long"], "vLLM refuses a prompt: the prompt is too long"),
        (["--use_vllm", "--vllm_gpu_memory_utilization", "2"], "expected a number in (0, 1], got '2'"),
    ],
)
def test_mistakes_are_one_line(vllm, model, data, refused, options, words):
    assert refused("eval", "--model", model, "--data", data, *options).endswith(words)


def test_a_vision_tower_that_vllm_would_compute_otherwise_is_refused(vllm, small_model, data, refused):
    """Found by `benchmarks/vllm_agreement.py`: vLLM takes the published base, whatever the configuration says."""
    words = refused("eval", "--model", small_model, "--data", data, "--use_vllm")
    assert words.endswith("has rope_theta 100, but vLLM always computes with 10000; leave out --use_vllm")


def test_adapters_are_refused(vllm, model, data, tmp_path, refused):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    words = refused("eval", "--model", tmp_path, "--data", data, "--use_vllm")
    assert (
        words == f"--use_vllm: {tmp_path} is an adapter: `cppo export --model {tmp_path} --out DIR` makes a model of it"
    )


def test_vllm_is_installed_apart(monkeypatch, model, data, refused):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = refused("eval", "--model", model, "--data", data, "--use_vllm")
    assert words == "use_vllm needs the package vllm; pip install vllm"


def test_vllm_does_not_see_the_launcher(monkeypatch):
    launcher = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    launcher |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": "2,5,6,7"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    before = dict(os.environ)
    with own_environment(2):
        assert {name: os.environ[name] for name in launcher if name in os.environ} == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert dict(os.environ) == before


def test_each_process_takes_gpus_of_its_own():
    every = [own_gpus("abcdef", index, 3, 2) for index in range(3)]
    assert every == [["a", "b"], ["c", "d"], ["e", "f"]]
    with pytest.raises(UserError, match=r"size 2 in 4 processes takes 8 GPUs, but there are 6; start fewer processes"):
        own_gpus("abcdef", 0, 4, 2)


def test_a_rating_asks_for_the_models_own_probabilities(vllm, model, data, tmp_path):
    out = str(tmp_path / "ratings.jsonl")
    argv = ["--data", data, "--out", out, "--samples", "2", "--use_vllm", "--dtype", "float32"]
    assert main(["data", "rate", "--model", model, *argv]) == 0
    assert [parameters.logprobs for _, parameters in vllm.asked] == [0] * 6
    lines = [json.loads(line) for line in Path(out).read_text().splitlines()[1:]]
    assert [line["accuracy"] for line in lines] == [1.0, 0.0, 1.0]
    assert [line["answers"] for line in lines] == [[["7", 2, 1.0]]] * 3
