"""Token figures of `inspect_record` against a plain float64 computation, and truth found in sampled responses."""

import math

import pytest
import torch

from cppo.assets import resolve_model
from cppo.data import Record, chat_messages, load_records
from cppo.evaluation import load_model, prompt_inputs
from cppo.evaluation.detectors import detector_quality, true_spans
from cppo.evaluation.inspection import InspectOptions, inspect_record
from cppo.views import ViewSampler


@pytest.fixture(scope="module")
def micro():
    return load_model(resolve_model("micro"))


@pytest.fixture(scope="module")
def record():
    return load_records("tasks:digits?noise=100", split="test", limit=5)[4]


@pytest.fixture(scope="module")
def item(micro, record):
    return inspect_record(*micro, record, ViewSampler(0), InspectOptions(samples=3, temperature=1.5, seed=1))


def logits_by_hand(micro, record, images, text):
    """Next-token logits of each response token, one row at a time, divided by the temperature, in float64."""
    model, processor = micro
    inputs = dict(prompt_inputs(processor, [chat_messages(record.prompt)], [images]))
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1]))
    with torch.no_grad():
        return model(**inputs).logits[0, start - 1 : -1].double() / 1.5, ids[0]


def test_every_figure_of_a_token(micro, record, item):
    response = max(item.responses, key=lambda one: len(one.tokens))
    text = "".join(token.text for token in response.tokens)
    images = {"image": record.images, "preserving": item.preserving, "removing": item.removing}
    log_p = {}
    for view, shown in images.items():
        logits, ids = logits_by_hand(micro, record, shown, text)
        log_p[view] = torch.log_softmax(logits, dim=-1)
    assert len(ids) == len(response.tokens)
    for place, token in enumerate(response.tokens):
        rows = {view: values[place] for view, values in log_p.items()}
        for view, row in rows.items():
            assert token.logps[view] == pytest.approx(float(row[ids[place]]), abs=1e-4)
            assert token.entropies[view] == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-4)
            probabilities = [probability for _, probability in token.alternatives[view]]
            assert probabilities == pytest.approx(row.exp().topk(5).values.tolist(), abs=1e-4)
        for view, found in (("preserving", token.d_preserving), ("removing", token.d_removing)):
            divergence = float((rows["image"].exp() * (rows["image"] - rows[view])).sum())
            shift = float(rows[view][ids[place]] - rows["image"][ids[place]])
            assert found["kl"] == pytest.approx(divergence, abs=1e-4)
            clamped = min(10.0, math.exp(max(-20.0, min(20.0, shift))) - shift - 1)
            assert found["k3"] == pytest.approx(clamped, rel=1e-3, abs=1e-4)
        entropy = {view: float(-(row.exp() * row).sum()) for view, row in rows.items()}
        rise = max(0.0, entropy["removing"] - entropy["image"])
        assert token.scores["entropy_shift_absolute"] == pytest.approx(rise, abs=1e-4)
        assert token.scores["k3"] == token.d_removing["k3"]
        assert token.scores["entropy"] == token.entropies["image"]
        assert token.scores["entropy_shift"] == pytest.approx(rise / (entropy["removing"] + 1e-6), abs=1e-3)
    positive = [token.scores["kl"] for token in response.tokens if token.scores["kl"] > 0]
    kept = [token.scores["kl"] for token in response.tokens if token.selected["kl"]]
    assert sorted(kept) == sorted(positive)[-max(1, len(positive) // 2) :]


def test_a_response_ends_with_its_end_token_and_rewards_make_advantages(item):
    assert all(response.tokens[-1].text == "<|im_end|>" for response in item.responses)
    rewards = [0.9 * response.correct + 0.1 * response.well_formed for response in item.responses]
    for response, reward in zip(item.responses, rewards, strict=True):
        assert response.advantage == pytest.approx(reward - sum(rewards) / 3)


def test_the_method_says_what_is_selected_and_gated_in(micro, record, item):
    def inspected(**given):
        options = InspectOptions(samples=3, temperature=1.5, seed=1, **given)
        return inspect_record(*micro, record, ViewSampler(0), options).responses

    for response in inspected(selector="all", gate="correct"):
        assert all(token.selected["kl"] for token in response.tokens)
        assert response.gated_in == response.correct
    for response in inspected(selector="top", top_fraction=0.25, gate="none"):
        scores = sorted(token.scores["logp_shift"] for token in response.tokens)
        kept = sorted(token.scores["logp_shift"] for token in response.tokens if token.selected["logp_shift"])
        assert kept == scores[-max(1, len(scores) // 4) :]
        assert response.gated_in
    drawn = inspected(selector="random")
    for response, ranked in zip(drawn, item.responses, strict=True):
        assert sum(token.selected["kl"] for token in response.tokens) == sum(
            token.selected["kl"] for token in ranked.tokens
        )
        assert ranked.gated_in == (ranked.advantage > 0)
    assert drawn == inspected(selector="random")
    selected = [
        [token.selected["kl"] for one in responses for token in one.tokens] for responses in (drawn, item.responses)
    ]
    assert selected[0] != selected[1]


def scripted(micro, monkeypatch, record, *texts, tolerance=0.0):
    """The record's inspected responses, given as texts."""
    rows = micro[1].tokenizer(list(texts))["input_ids"]
    monkeypatch.setattr("cppo.evaluation.inspection.generate_tokens", lambda *args, **options: rows)
    options = InspectOptions(samples=len(rows), tolerance=tolerance)
    found = inspect_record(*micro, record, ViewSampler(0), options).responses
    assert [response.text for response in found] == list(texts)
    return found


@pytest.mark.parametrize("samples", [6, 7, 8, 12])
def test_responses_with_equal_rewards_are_not_gated_in(micro, monkeypatch, samples):
    wrong = ["<think> </think> \\boxed{5}"] * samples
    found = scripted(micro, monkeypatch, Record("1", "3 + 4 = ?", (), "7"), *wrong)
    assert all(response.well_formed for response in found)
    assert [(response.advantage, response.gated_in) for response in found] == [(0.0, False)] * samples


def test_the_text_of_the_right_choice_is_right(micro, monkeypatch):
    record = Record("1", "which?", (), "B", choices=("red", "blue"))
    found = scripted(micro, monkeypatch, record, "\\boxed{blue}", "\\boxed{red}", "\\boxed{B}")
    assert [response.correct for response in found] == [True, False, True]


@pytest.mark.parametrize(("tolerance", "right"), [(0.0, False), (0.1, True)])
def test_a_number_may_be_as_far_off_as_the_run_let_it(micro, monkeypatch, tolerance, right):
    record = Record("1", "3 + 7 = ?", (), "10")
    found = scripted(micro, monkeypatch, record, "\\boxed{9}", "\\boxed{10}", tolerance=tolerance)
    assert [response.correct for response in found] == [right, True]


def test_text_only_rows_depend_on_no_image(micro):
    found = inspect_record(
        *micro, Record("1", "3 + 4 = ?", (), "7"), ViewSampler(0), InspectOptions(samples=1, max_new_tokens=8)
    )
    (response,) = found.responses
    assert response.advantage is None
    for token in response.tokens:
        assert max(value for name, value in token.scores.items() if name != "entropy") < 1e-6
    assert not any(kept for token in response.tokens for kept in token.selected.values())
    assert all(token.true_perception is None for token in response.tokens)


REFERENCE = "I see 3 and 5. 3 + 5 = 8."
SPANS = [(6, 7), (12, 13)]


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("I see 3 and 5. 3 + 5 = 8.", ["3", "5"]),
        ("I see 9 and 1. 9 + 1 = 10.", ["9", "1"]),
        ("Well, I see 9 and 5. 9 + 5 = 14.", ["9", "5"]),
        ("nothing of the kind", []),
        ("", []),
    ],
)
def test_true_spans(response, words):
    assert [response[start:end] for start, end in true_spans(response, REFERENCE, SPANS)] == words


def test_the_true_tokens_of_a_sample(item):
    for response in item.responses:
        true = [token.text.strip() for token in response.tokens if token.true_perception]
        assert len(true) == 2
        assert all(text.isdigit() for text in true)


def test_detector_quality_by_hand():
    # Ranked by score: true, false, true: precision at the hits 1/1 and 2/3.
    quality = detector_quality([0.9, 0.1, 0.5, 0.7], [True, False, False, True], [True, False, True, False])
    assert quality.auprc == pytest.approx((1 + 2 / 3) / 2)
    assert (quality.precision, quality.recall, quality.base_rate, quality.tokens) == (0.5, 0.5, 0.5, 4)
    assert detector_quality([0.5], [True], [False]) is None
    nan = float("nan")
    assert detector_quality([nan, 0.5, nan], [False] * 3, [True, True, False]).auprc == pytest.approx((1 + 2 / 3) / 2)
    assert detector_quality([nan, nan], [False] * 2, [True, False]).auprc == 0.5
    assert detector_quality([0.5], [False], [True]).precision is None
