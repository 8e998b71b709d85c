"""Why no response has the form that the standard rewards look for."""

import pytest

from cppo.rewards import ChatForm, format_reward, get_format_reward, reward_columns

GOOD = "<think>two and one</think> \\boxed{3}"
ASKS = "Think within <think> </think> and answer in \\boxed{}."


class Tokenizer:
    """Knows words; those in `special` are left out where special tokens are skipped."""

    def __init__(self, special=()):
        self.special, self.words = set(special), []

    def __call__(self, text, add_special_tokens):
        self.words.append(text)
        return {"input_ids": [len(self.words) - 1]}

    def decode(self, ids, skip_special_tokens):
        words = [self.words[one] for one in ids]
        return "".join(word for word in words if not (skip_special_tokens and word in self.special))


class Processor:
    """A chat template that lets the assistant begin with `begins`, after a system message."""

    chat_template = "a template"

    def __init__(self, begins="", system="", special=()):
        self.begins, self.system, self.tokenizer = begins, system, Tokenizer(special)

    def apply_chat_template(self, chat, add_generation_prompt, tokenize, **kwargs):
        thinks = self.begins if kwargs.get("enable_thinking", True) else "<think>\n\n</think>\n\n"
        text = self.system + "".join(f"user: {message['content'][0]['text']}\n" for message in chat)
        return text + (f"assistant: {thinks}" if add_generation_prompt else "")


@pytest.mark.parametrize(
    ("begins", "opened"),
    [("", ""), ("<think>", "<think>"), ("<think>\n", "<think>\n"), ("Sure. <think>\n", "<think>\n")],
)
def test_what_a_template_opens(begins, opened):
    assert ChatForm.of(Processor(begins)).opened == opened
    assert ChatForm.of(Processor(begins, system="Use <think>.\n")).opened == opened


def test_a_templates_own_arguments_count():
    assert ChatForm.of(Processor("<think>\n"), enable_thinking=False).opened == "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("form", ["strict", "published"])
@pytest.mark.parametrize(
    ("opened", "response", "counts"),
    [
        ("<think>\n", "two and one</think> \\boxed{3}", True),
        ("<think>\n", GOOD, True),
        ("<think>\n\n</think>\n\n", "\\boxed{3}", True),
        ("<think>\n", "two and one \\boxed{3}", False),
        ("", "two and one</think> \\boxed{3}", False),
    ],
)
def test_an_opened_tag_counts(form, opened, response, counts):
    assert get_format_reward(form)([response], prompt_opens=[opened]) == [float(counts)]
    assert get_format_reward(form)([[{"role": "assistant", "content": response}]], prompt_opens=[opened]) == [
        float(counts)
    ]


def test_what_the_prompt_opens_is_no_column_of_the_data():
    assert "prompt_opens" not in reward_columns(format_reward)


def test_without_an_opening_nothing_is_counted():
    assert format_reward([GOOD, "\\boxed{3}"]) == [1.0, 0.0]


NOBODY = "no prompt asks for `<think>` and `\\boxed{}`: ask for it with system_prompt or prompt_suffix"


@pytest.mark.parametrize(
    ("form", "prompts", "responses", "causes"),
    [
        (ChatForm(), ["How many?"], [], [NOBODY]),
        (ChatForm(), ["How many?"], ["three"], [NOBODY]),
        (ChatForm(), [ASKS], [], []),
        (ChatForm(added=ASKS), ["How many?"], [], []),
        (ChatForm(), [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKS}]}]], [], []),
        (ChatForm(), [[{"role": "system", "content": ASKS}, {"role": "user", "content": "?"}]], [], []),
        (ChatForm(), ["Answer in \\boxed{}."], [], ["no prompt asks for `<think>`: "]),
        (ChatForm("<think>\n"), ["How many?"], [], ["no prompt asks for `\\boxed{}`: "]),
        (
            ChatForm(dropped=("<think>", "</think>")),
            [ASKS],
            [],
            ["decoding drops `<think>` and `</think>` as special tokens"],
        ),
        (ChatForm("<think>\n", dropped=("<think>",)), [ASKS], [], []),
        (ChatForm(dropped=("<think>",)), ["How many?"], [], ["decoding drops", "no prompt asks for `\\boxed{}`: "]),
        (ChatForm(), ["How many?"], ["<think>so</think> 3"], ["no prompt asks for `\\boxed{}`: "]),
        (ChatForm(), [ASKS], ["three", "four"], ["prompts ask for `<think>` and `\\boxed{}`, but no response has"]),
        (ChatForm(), [ASKS], ["\\boxed{3} <think>so</think>"], ["responses have parts of the form, but none has"]),
        (ChatForm(built_in=True), ["How many?"], [], []),
        (
            ChatForm(built_in=True),
            ["How many?"],
            ["three"],
            ["no response has `<think>` and `\\boxed{}`: teach the form"],
        ),
    ],
)
def test_the_causes(form, prompts, responses, causes):
    found = form.causes(prompts, responses)
    assert len(found) == len(causes)
    assert all(one.startswith(start) for one, start in zip(found, causes, strict=True)), found


def test_a_box_alone_where_only_the_answer_is_rewarded():
    assert ChatForm().causes(["Answer in \\boxed{}."], marks=("\\boxed{}",)) == []
    assert ChatForm(dropped=("<think>",)).causes(["How many?"], marks=("\\boxed{}",)) == [
        "no prompt asks for `\\boxed{}`: ask for it with system_prompt or prompt_suffix"
    ]


@pytest.mark.parametrize(
    ("special", "dropped"),
    [((), ()), (("<think>",), ("<think>",)), (("<think>", "</think>"), ("<think>", "</think>"))],
)
def test_tags_that_decoding_drops(special, dropped):
    assert ChatForm.of(Processor(special=special)).dropped == dropped
