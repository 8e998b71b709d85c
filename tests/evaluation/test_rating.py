"""Ratings by sampled answers, against closed forms and a brute force in float64, with scripted and real responses."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import SMALL

from cppo.assets.build import build_micro
from cppo.data import Record, load_records, load_rows
from cppo.evaluation import (
    Response,
    TransformersEngine,
    answer_clusters,
    load_model,
    rate_records,
    semantic_entropy,
)
from cppo.evaluation.generate import prompt_inputs, response_stream, sample_responses
from cppo.evaluation.rating import rate_responses
from cppo.policy import vision_placeholder_ids
from cppo.rewards import accuracy_reward


def boxed(answer):
    return f"<think> seen </think> \\boxed{{{answer}}}" if answer else "I cannot tell."


def rated(answers, logps=None, expected="12", choices=None):
    record = Record("r", "How many?", (), expected, choices=choices)
    logps = [-3.0] * len(answers) if logps is None else logps
    responses = [Response(boxed(answer), logp) for answer, logp in zip(answers, logps, strict=True)]
    return rate_responses("row", record, responses, accuracy_reward)


def test_closed_forms():
    assert rated(["7"] * 5).semantic_entropy == rated(["7"] * 5).discrete_semantic_entropy == 0
    for count in (2, 3, 8):
        spread = rated([str(number) for number in range(count)])
        assert spread.semantic_entropy == pytest.approx(math.log(count), abs=1e-12)
        assert spread.discrete_semantic_entropy == pytest.approx(math.log(count), abs=1e-12)
        assert (spread.clusters, spread.confidence) == (count, 1 / count)
    # Answers a, a, b, c that are equally likely.
    assert rated(["1", "1", "2", "3"]).semantic_entropy == pytest.approx(1.0397, abs=5e-5)
    for p in (0.1, 0.25, 0.9):
        two = rated(["1", "2"], [math.log(p), math.log(1 - p)])
        assert two.semantic_entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-12)
        assert two.discrete_semantic_entropy == pytest.approx(math.log(2), abs=1e-12)


def test_probabilities_that_underflow_keep_their_shares():
    near, far = (rated(["1", "2", "2"], [shift + part for part in (-1, -2, -3)]) for shift in (0, -5_000))
    assert near.semantic_entropy == pytest.approx(far.semantic_entropy, abs=1e-9)
    assert near.semantic_entropy > 0.5


def test_against_a_brute_force():
    """Clusters by all pairs, probabilities in the plain, in float64."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        answers = generator.integers(1, 5, size=generator.integers(2, 9))
        logps = generator.uniform(-4, 0, size=len(answers))
        mass = {one: sum(math.exp(p) for a, p in zip(answers, logps, strict=True) if a == one) for one in {*answers}}
        shares = [value / sum(mass.values()) for value in mass.values()]
        counts = [sum(answers == one) / len(answers) for one in {*answers}]
        found = rated([str(one) for one in answers], logps.tolist(), expected="2")
        assert found.semantic_entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
        assert found.discrete_semantic_entropy == pytest.approx(-sum(p * math.log(p) for p in counts), abs=1e-12)
        assert found.confidence == max(counts)
        assert found.accuracy == pytest.approx(sum(answers == 2) / len(answers))
        assert {(answer, count) for answer, count, _ in found.answers} == {
            (str(one), int(sum(answers == one))) for one in {*answers}
        }


def test_weights_without_a_sum_have_no_entropy():
    for weights in ([], [0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="positive sum"):
            semantic_entropy(weights)


def test_equal_answers_are_one_cluster():
    """As the rewards compare, whatever the order of the answers."""
    answers = ["1/2", "0.5", "3", r"\frac{1}{2}", "3.0", "seven", "Seven."]
    for order in itertools.permutations(range(len(answers)), 4):
        shown = [answers[place] for place in order]
        groups = [{"1/2": 0, "0.5": 0, r"\frac{1}{2}": 0, "3": 1, "3.0": 1}.get(answer, 2) for answer in shown]
        found = answer_clusters(shown)
        pairs = itertools.combinations(range(4), 2)
        assert all((found[a] == found[b]) == (groups[a] == groups[b]) for a, b in pairs)
        assert sorted(set(found)) == list(range(len(set(found))))
    assert answer_clusters(["B", "blue", "A"], choices=["red", "blue"]) == [0, 0, 1]
    assert answer_clusters(["100", "101", "120"], tolerance=0.05) == [0, 0, 1]
    # What would be right by hedging is no equal: each must be right where the other is expected.
    assert answer_clusters(["A or B", "A"], choices=["red", "blue"]) == [0, 1]
    assert answer_clusters(['["5", "6"]', "5"]) == [0, 1]


def test_a_response_without_an_answer_agrees_with_none():
    found = rated(["a", "a", "b", ""], expected="a")
    assert (found.confidence, found.answers[0][0], found.clusters) == (0.5, "a", 3)
    silent = rated(["", "", ""])
    assert (silent.confidence, silent.accuracy, silent.clusters) == (0, 0, 3)
    assert silent.semantic_entropy == pytest.approx(math.log(3))


class Script:
    """An engine whose answers depend on the stream alone; `batches` are the numbers of prompts it was given."""

    def __init__(self):
        self.batches = []

    def answer(self, prompts, images, **options):
        return [text for text, _ in self.sample(prompts, images, **options)]

    def sample(self, prompts, images, *, streams, **options):
        self.batches.append(len(prompts))
        draws = [stream.random(2) for stream in streams]
        return [Response(boxed(int(3 * answer)), -float(logp)) for answer, logp in draws]


def test_neither_batches_nor_a_stop_change_a_rating():
    source = load_rows([{"prompt": f"How many {i}?", "answer": str(i % 3)} for i in range(7)])
    whole = rate_records(Script(), None, source, samples=4, batch_size=64)
    assert len({rating.semantic_entropy for rating in whole}) > 4
    assert [rating.row for rating in whole] == [source.content_digest(index) for index in range(7)]
    kept, engine = [], Script()
    rest = rate_records(engine, None, source, samples=4, batch_size=8, known=whole[:3], keep=kept.append)
    assert rest == whole
    assert kept == whole[3:]
    assert engine.batches == [8, 8, 4]  # the third row is asked again with its neighbour
    assert rate_records(Script(), None, source, samples=4, seed=1) != whole

    with pytest.raises(ValueError, match="samples >= 2"):
        rate_records(Script(), None, source, samples=1)


def test_the_content_decides_a_digest():
    def digest(prompt="How many?", answer="1", color="red", **more):
        return load_rows([{"prompt": prompt, "answer": answer, "image": Image.new("RGB", (8, 8), color), **more}])

    same = digest().content_digest(0)
    assert digest(id="other").content_digest(0) == same
    others = [digest("How?"), digest(answer="2"), digest(color="blue"), digest(choices=["1", "2"])]
    assert len({same, *(one.content_digest(0) for one in others)}) == 5
    scaled = load_records("tasks:digits?n=2", prompt_suffix="Be brief.", with_facts=True)
    assert scaled.content_digest(1) == load_records("tasks:digits?n=2").content_digest(1)


@torch.no_grad()
def test_the_log_probability_of_a_response_is_the_models_own(tmp_path):
    """A forward pass over prompt and response, without cache or padding, in float64."""
    model, processor = load_model(str(build_micro(tmp_path / "model", **SMALL)), device="cpu")
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)
    prompts = [[{"role": "user", "content": text}] for text in ("What is it?", "1 + 1 + 1?")]
    images = [(Image.new("RGB", (64, 64), "red"),), ()]
    streams = [response_stream(0, "r", number) for number in range(2)]
    options = {"max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9}
    drawn = sample_responses(model, processor, prompts, images, streams=streams, **options)
    assert [one.text for one in drawn] == TransformersEngine(model, processor).answer(
        prompts, images, streams=[response_stream(0, "r", number) for number in range(2)], **options
    )
    model.double()
    banned, ends = vision_placeholder_ids(processor, model.config), processor.tokenizer.eos_token_id
    for prompt, pictures, response in zip(prompts, images, drawn, strict=True):
        inputs = prompt_inputs(processor, [prompt], [pictures])
        start = inputs["input_ids"].shape[1]
        tokens = processor.tokenizer(response.text, add_special_tokens=False, return_tensors="pt").input_ids
        if tokens.shape[1] < 5:
            tokens = torch.cat([tokens, torch.tensor([[ends]])], dim=1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        logits = model(**inputs, use_cache=False).logits[0, start - 1 : -1]
        logits[:, banned] = -torch.inf
        logps = logits.log_softmax(-1).gather(-1, tokens[0][:, None])
        assert response.logp == pytest.approx(logps.sum().item(), abs=1e-3)
