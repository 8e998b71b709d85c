"""The reward for descriptions from which the policy answers without the image: Vision-SR1 and Visionary-R1."""

import time
from statistics import mean, stdev

import pytest

from cppo.errors import UserError
from cppo.methods import get_method
from cppo.options.schedules import Schedule
from cppo.rewards import accuracy_reward, get_format_reward
from cppo.rewards.asking import text_only
from cppo.rewards.description import MAX_DESCRIPTION_CHARS, described, get_description_reward

PROMPT = [
    {"role": "system", "content": "Describe, then think."},
    {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "How many dots?"}]},
]
GOOD = r"<description> Two red dots and one blue. </description><think> 2 + 1 </think> \boxed{3}"


def earned(reward, completions, policy, answer="3", **columns):
    """What the completions earn where `policy` answers a question's text; and the questions that it was asked."""
    asked = []

    def ask(questions, sampling):
        asked.extend(questions)
        return [None if one is None else policy(one.prompt[-1]["content"]) for one in questions]

    count = len(completions)
    found = reward(completions, ask_policy=ask, prompts=[PROMPT] * count, answer=[answer] * count, **columns)
    return found, asked


def right(question):
    return r"<think> so </think> \boxed{3}"


def test_the_policy_is_asked_with_the_description_in_the_place_of_the_image():
    (reward,), (question,) = earned(get_description_reward(), [GOOD], right)
    assert reward == 1.0
    assert question.images == ()
    system, user = question.prompt
    assert system == {"role": "system", "content": "Describe, then think."}
    assert user["content"].endswith("Description: Two red dots and one blue.\nQuestion: How many dots?")
    assert "3" not in user["content"]
    assert earned(get_description_reward(), [GOOD], lambda question: r"\boxed{4}")[0] == [0.0]
    assert earned(get_description_reward(), [GOOD], lambda question: "3")[0] == [0.0]


@pytest.mark.parametrize(
    "completion",
    [
        r"<think> 3 </think> \boxed{3}",  # no tag: the published code asks with the whole response, the answer in it
        r"<description></description><think> 3 </think> \boxed{3}",
        "<description> \n\t </description> \\boxed{3}",
        r"<description> Three dots. \boxed{3}",
        r"</description> Three dots. <description> \boxed{3}",
        r"<description> one <description> two </description> \boxed{3}",
        r"<DESCRIPTION> Three dots. </DESCRIPTION> \boxed{3}",
        r"<description> The answer is \boxed{3}. </description> \boxed{3}",
        f"<description> {'x' * (MAX_DESCRIPTION_CHARS + 1)} </description>",
        "",
    ],
)
def test_a_missing_or_empty_description_earns_nothing_and_asks_nothing(completion):
    assert earned(get_description_reward(), [completion], right) == ([0.0], [None])


def test_descriptions_span_lines_and_keep_to_their_own_responses():
    """The published code matches no line breaks, and responses without a description shift the others' rewards."""
    completions = ["none", "<description> a\nb </description>", "none", GOOD]
    found, asked = earned(get_description_reward(), completions, lambda text: r"\boxed{3}" if "a\nb" in text else "")
    assert found == [0.0, 1.0, 0.0, 0.0]
    assert [one is None for one in asked] == [True, False, True, False]


def test_a_guard_may_look_for_the_answer_itself():
    told = r"<description> The answer is 3. </description> \boxed{3}"
    boxed = r"<description> \boxed{3} </description> \boxed{3}"
    counted = r"<description> 13 dots, x3 </description> \boxed{3}"
    by_guard = {
        guard: earned(get_description_reward(guard=guard), [told, boxed, counted], right)[0]
        for guard in ("none", "box", "answer")
    }
    assert by_guard == {"none": [1.0, 1.0, 1.0], "box": [1.0, 0.0, 1.0], "answer": [0.0, 0.0, 1.0]}


def test_a_refusal_earns_nothing():
    reward = get_description_reward(refusal="not a description")
    answers = iter(["It is NOT A DESCRIPTION. \\boxed{3}", "\\boxed{3}"])
    found, (question, _) = earned(reward, [GOOD, GOOD], lambda _: next(answers))
    assert found == [0.0, 1.0]
    assert 'write only "not a description"' in question.prompt[-1]["content"]


def test_tags_are_options():
    reward = get_description_reward(opening="see", closing=".")
    found, (question,) = earned(reward, [r"<think> I see 2 and 1. 2 + 1 = 3. </think> \boxed{3}"], right)
    assert found == [1.0]
    assert "Description: 2 and 1\n" in question.prompt[-1]["content"]


def test_hostile_texts_take_linear_time():
    """10 MB of text, tags that nest, tags that never close, NUL."""
    size = 10_000_000
    texts = [
        f"<description>{'x' * size}</description>",
        "<description>" * (size // 13),
        "<description>\0" + "</descriptio" * (size // 12),
        "<" * size,
        "<description>\0</description>",
    ]
    started = time.process_time()
    assert [described(text, "<description>", "</description>") for text in texts] == [None, None, None, None, "\0"]
    assert earned(get_description_reward(), texts, right)[0][:4] == [0.0] * 4
    assert time.process_time() - started < 20  # seconds; a scan that begins anew at each tag takes hours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opening": " "}, "opening = ' ': give the tag"),
        ({"closing": 3}, "closing = 3: give the tag"),
        ({"guard": "boxed"}, "guard = 'boxed' is unknown; did you mean `box`"),
        ({"refusal": ""}, "refusal = '': give the words"),
        ({"max_tokens": 0}, "max_tokens = 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        get_description_reward(**options)


def test_text_only_takes_text_of_any_form():
    assert text_only("Q", str.lower) == "q"
    chat = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    assert [message["content"] for message in text_only(chat, str.lower)] == ["A", "B", "c"]
    assert chat[2]["content"] == "C"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (GOOD, 1.0),
        (" \n" + GOOD, 1.0),
        (r"<think> 2 + 1 </think> \boxed{3}", 0.0),
        (GOOD.replace("Two red dots and one blue.", ""), 0.0),
        (GOOD + "</description>", 0.0),
        ("So " + GOOD, 0.0),
        (GOOD.replace("<think>", ""), 0.0),
        (GOOD.replace("{3}", "{}"), 0.0),
    ],
)
def test_the_form_with_a_description_before(text, value):
    assert get_format_reward(before="description")([text]) == [value]


def test_a_form_before_which_stands_no_tag():
    for options in ({"before": "a b"}, {"before": 1}, {"form": "published", "before": "description"}):
        with pytest.raises(UserError, match="give the name of a tag"):
            get_format_reward(**options)


def weighted(method, *rewards):
    """The sums of a method's rewards for rollouts, from each reward's values."""
    weights = get_method(method).rewards.values()
    return [
        sum(weight * value for weight, value in zip(weights, values, strict=True))
        for values in zip(*rewards, strict=True)
    ]


def test_vision_sr1_in_closed_form():
    """(accuracy, format, second accuracy) of four rollouts, and their advantages in float64."""
    correct, formatted, second = [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0]
    texts = [GOOD.replace("{3}", f"{{{3 if right else 4}}}") for right in correct]
    texts = [text if form else text.replace("<think>", "") for text, form in zip(texts, formatted, strict=True)]
    answers = iter(r"\boxed{3}" if value else r"\boxed{5}" for value in second)
    last, _ = earned(get_description_reward(), texts, lambda _: next(answers))
    sums = weighted(
        "vision-sr1", accuracy_reward(texts, answer=["3"] * 4), get_format_reward(before="description")(texts), last
    )
    assert sums == pytest.approx([2, 1, 1.1, 0])
    assert (mean(sums), stdev(sums)) == (pytest.approx(1.025), pytest.approx(0.8180, abs=1e-4))
    assert [(one - mean(sums)) / stdev(sums) for one in sums] == pytest.approx([1.192, -0.031, 0.092, -1.253], abs=1e-3)
    # A missing tag must not pay, whatever the policy says.
    assert earned(get_description_reward(), [r"<think> 3 </think> \boxed{3}"], right)[0] == [0.0]


def test_visionary_r1_in_closed_form():
    """Right, formatted, and the caption right: 2.1; a refusal: 2.0; the same however often it is called."""
    text = r"<info> Two dots and one. </info> <think> 3 </think> \boxed{3}"
    names = list(get_method("visionary-r1").rewards)
    assert names[1] == "format?before=info"
    reward = get_description_reward("<info>", "</info>", refusal="not a description")
    base = accuracy_reward([text], answer=["3"]), get_format_reward(before="info")([text])
    for _ in range(3):
        assert weighted("visionary-r1", *base, earned(reward, [text], right)[0]) == pytest.approx([2.1])
    refused = earned(reward, [text], lambda _: "not a description")[0]
    assert weighted("visionary-r1", *base, refused) == pytest.approx([2.0])
    options = get_method("visionary-r1").options
    (schedule,) = map(Schedule.parse, options["schedules"])
    weights = [options[schedule.option] * schedule.factor(epochs) for epochs in (0.0, 0.5, 1.0)]
    assert weights == pytest.approx([0.04, 0.02, 0.0])
