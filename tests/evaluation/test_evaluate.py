"""Scores and their bookkeeping, with the model's answers scripted."""

import pytest
from PIL import Image

from cppo.data import Record
from cppo.evaluation import BLANK, blank_images, evaluate, get_condition
from cppo.evaluation.evaluate import score_item
from cppo.evaluation.generate import response_stream
from cppo.evaluation.statistics import bootstrap_interval, mean_interval

GOOD = "<think> seen </think> \\boxed{%s}"


def records(count):
    return [Record(f"r{i}", f"question {i}", (Image.new("RGB", (8, 4), "red"),), str(i)) for i in range(count)]


class Script:
    """An engine; `calls` keeps what was asked, `reply` says what record i's s-th sample is."""

    def __init__(self):
        self.calls = []
        self.reply = lambda number, sample: GOOD % number

    def answer(self, prompts, images, **options):
        self.calls.append((prompts, images, options))
        seen, responses = {}, []
        for prompt in prompts:
            number = prompt[-1]["content"].split()[-1]
            responses.append(self.reply(number, seen.setdefault(number, 0)))
            seen[number] += 1
        return responses


@pytest.fixture
def script():
    return Script()


def test_accuracy_format_rate_and_interval(script):
    answers = {"0": GOOD % 0, "1": "\\boxed{1}", "2": GOOD % 7, "3": "nothing", "4": GOOD % 4}
    script.reply = lambda number, sample: answers[number]
    result = evaluate(script, None, records(5), batch_size=2)
    assert result.accuracies == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert result.accuracy == 3 / 5
    assert result.format_rate == 3 / 5
    assert result.accuracy_ci95 == mean_interval([1.0, 1.0, 1.0, 0.0, 0.0])
    assert [len(prompts) for prompts, _, _ in script.calls] == [2, 2, 1]
    assert all(options["temperature"] == 0.0 for _, _, options in script.calls)
    assert [item.id for item in result.items] == ["r0", "r1", "r2", "r3", "r4"]


def test_average_over_samples(script):
    # record i is right in its first i samples of 4
    script.reply = lambda number, sample: GOOD % (number if sample < int(number) else "wrong")
    result = evaluate(script, None, records(4), samples=4, batch_size=8)
    assert result.accuracies == [0.0, 0.25, 0.5, 0.75]
    assert result.accuracy == 0.375
    assert all(len(item.responses) == 4 for item in result.items)
    assert all(options["temperature"] == 1.0 for _, _, options in script.calls)
    assert [len(prompts) for prompts, _, _ in script.calls] == [8, 8]
    assert result.accuracy_ci95 == bootstrap_interval([0.0, 0.25, 0.5, 0.75])
    drawn = [stream.random() for _, _, options in script.calls for stream in options["streams"]]
    assert drawn == [response_stream(0, f"r{i}", s).random() for i in range(4) for s in range(4)]
    # choosing 2 of an item's 4 samples misses its i right ones in C(4 - i, 2) of C(4, 2) = 6 cases
    assert result.pass_at(2).mean == pytest.approx((0 + 3 / 6 + 5 / 6 + 6 / 6) / 4, abs=1e-12)
    assert result.pass_at(1).mean == pytest.approx(result.accuracy, abs=1e-12)
    passed = result.to_dict([4])["pass_at_k"]
    assert passed == {"4": {"mean": 0.75, "ci95": list(mean_interval([1.0, 1.0, 1.0, 0.0]))}}


@pytest.mark.parametrize(
    ("record", "answer", "tolerance", "correct"),
    [
        (Record("c", "q 0", (), "B", choices=("red", "blue")), "blue", 0.0, 1.0),
        (Record("c", "q 0", (), "B"), "blue", 0.0, 0.0),
        (Record("n", "q 0", (), "100"), "95", 0.1, 1.0),
        (Record("n", "q 0", (), "100"), "95", 0.0, 0.0),
    ],
)
def test_choices_and_tolerance_decide_what_is_right(script, record, answer, tolerance, correct):
    script.reply = lambda number, sample: GOOD % answer
    (item,) = evaluate(script, None, [record], tolerance=tolerance).items
    assert item == score_item(record, [GOOD % answer], tolerance)
    assert item.correct == (correct,)
    assert item.choices == (record.choices or ())


@pytest.mark.parametrize(("known", "asked"), [(2, "234"), (3, "234"), (4, "4"), (5, "")])
def test_only_batches_that_hold_something_new_are_asked(script, known, asked):
    """A batch that is half known is asked whole, so that it is padded as before; what was known stays."""
    whole, kept, counts = evaluate(script, None, records(5), batch_size=2), [], []
    script.calls.clear()
    script.reply = lambda number, sample: "other" if int(number) < known else GOOD % number
    rest = evaluate(
        script,
        None,
        records(5),
        batch_size=2,
        known=whole.items[:known],
        keep=lambda record, item: kept.append((record.id, record.images, item)),
        progress=counts.append,
    )
    assert rest == whole
    assert "".join(prompt[-1]["content"][-1] for prompts, _, _ in script.calls for prompt in prompts) == asked
    assert kept == [(item.id, (), item) for item in whole.items[known:]]
    assert sum(counts) == 5 - known


def test_temperature_and_top_p_reach_the_generation(script):
    evaluate(script, None, records(1), temperature=0.5, top_p=0.9)
    options = script.calls[0][2]
    assert (options["temperature"], options["top_p"]) == (0.5, 0.9)
    with pytest.raises(ValueError, match="greedy"):
        evaluate(script, None, records(1), samples=2, temperature=0.0)


def test_images_are_shown_under_the_condition(script):
    record = records(1)[0]
    result = evaluate(script, None, [record], condition=get_condition("shift"), seed=3)
    assert result.condition == "shift"
    assert script.calls[0][1][0] == get_condition("shift").show(record, 3)


def test_more_samples_than_the_batch_holds(script):
    result = evaluate(script, None, records(2), samples=5, batch_size=2)
    assert result.n == 2
    assert [len(prompts) for prompts, _, _ in script.calls] == [5, 5]


def test_blank_images_have_the_same_sizes_and_one_colour(script):
    evaluate(script, None, records(1), condition=BLANK)
    (image,) = script.calls[0][1][0]
    assert image.size == (8, 4)
    assert len(image.getcolors()) == 1
    assert blank_images([]) == ()


def test_the_system_prompt_comes_first(script):
    evaluate(script, None, records(1), system_prompt="Think.")
    assert [message["role"] for message in script.calls[0][0][0]] == ["system", "user"]


def test_progress_counts_records(script):
    counts = []
    evaluate(script, None, records(5), samples=2, batch_size=4, progress=counts.append)
    assert counts == [2, 2, 1]


def test_json_values(script):
    figures = evaluate(script, None, records(3)).to_dict()
    assert figures["accuracy"] == 1.0
    assert figures["accuracy_ci95"] == list(mean_interval([1.0] * 3))
    assert (figures["n"], figures["samples"], figures["format_rate"]) == (3, 1, 1.0)


@pytest.mark.parametrize(("count", "samples"), [(0, 1), (1, 0)])
def test_nothing_to_evaluate(script, count, samples):
    with pytest.raises(ValueError, match="evaluate needs"):
        evaluate(script, None, records(count), samples=samples)
