r"""The form of the standard rewards, `<think>...</think> ... \boxed{...}`: reasons why no response has it.

A model may do all it was asked and still lack the form: the chat template opens `<think>` in the prompt, decoding drops
it as a special token, or no prompt asks for it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THINK, CLOSE, BOX = "<think>", "</think>", "\\boxed{}"
_WRITTEN = {THINK: THINK, BOX: "\\boxed{"}
_ASKED = {THINK: "<think", BOX: "boxed"}


@dataclass(frozen=True)
class ChatForm:
    """How a model's chat template and tokenizer change the form.

    Attributes:
        opened: the part of the form that the template writes at the end of a prompt, from its `<think>` on.
        added: the text of a chat with the question `?`: what the template adds to every prompt.
        dropped: tags that decoding drops as special tokens.
        built_in: whether the tokenizer has each mark of the form as one token. Such a model learns the form by
            training; instructions do not help.
    """

    opened: str = ""
    added: str = ""
    dropped: tuple[str, ...] = ()
    built_in: bool = False

    @classmethod
    def of(cls, processor: Any, **template: Any) -> "ChatForm":
        """From a processor or tokenizer; `template`: further arguments of its chat template."""
        if not getattr(processor, "chat_template", None):
            return cls(dropped=_dropped(processor), built_in=_built_in(processor))
        content: Any = [{"type": "text", "text": "?"}] if hasattr(processor, "tokenizer") else "?"
        chat = [{"role": "user", "content": content}]
        asked, begun = (
            processor.apply_chat_template(chat, add_generation_prompt=begins, tokenize=False, **template)
            for begins in (False, True)
        )
        answer = begun.removeprefix(asked)
        place = answer.find(THINK)
        opened = answer[place:] if place >= 0 else ""
        return cls(opened, begun, _dropped(processor), _built_in(processor))

    def causes(
        self, prompts: Iterable[Any], responses: Sequence[str] = (), marks: Sequence[str] = (THINK, BOX)
    ) -> list[str]:
        """Reasons why none of the responses has the form, each with a remedy; without responses, why none will have it.

        Args:
            prompts: texts or chats; some are enough.
            marks: what the rewards look for.
        """
        asked_for = "\n".join([self.added, *map(_text, prompts)])
        dropped = [tag for tag in self.dropped if THINK in marks and not (tag == THINK and self.opened)]
        settled = {THINK} if self.opened or dropped else set()
        lacking = [m for m in marks if m not in settled and not any(_WRITTEN[m] in one for one in responses)]
        unasked = [mark for mark in lacking if not self.built_in and _ASKED[mark] not in asked_for]
        unwritten = [mark for mark in lacking if mark not in unasked] if responses else []
        found = []
        if dropped:
            found.append(
                f'decoding drops {_named(dropped)} as special tokens: set "special": false for them in the model\'s '
                "tokenizer.json and tokenizer_config.json"
            )
        if unasked:
            found.append(f"no prompt asks for {_named(unasked)}: ask for it with system_prompt or prompt_suffix")
        if unwritten and self.built_in:
            found.append(
                f"no response has {_named(unwritten)}: teach the form with `cppo sft` (instructions do not help "
                "a model whose tokenizer was made for it), or raise the longest response if responses are cut off"
            )
        elif unwritten:
            found.append(
                f"prompts ask for {_named(unwritten)}, but no response has it: show it in the prompt, teach it with "
                "`cppo sft`, or raise the longest response if responses are cut off"
            )
        if responses and not found:
            remedy = "teach it with `cppo sft`" if self.built_in else "say so in system_prompt or prompt_suffix"
            found.append(
                f"responses have parts of the form, but none has `{THINK}...{CLOSE} ... \\boxed{{...}}` in this order: "
                f"{remedy}, or raise the longest response if responses are cut off"
            )
        return found


def _dropped(processor: Any) -> tuple[str, ...]:
    tokenizer = getattr(processor, "tokenizer", processor)
    found = []
    for tag in (THINK, CLOSE):
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        kept, all_of_it = (tokenizer.decode(ids, skip_special_tokens=skips) for skips in (True, False))
        if tag in all_of_it and tag not in kept:
            found.append(tag)
    return tuple(found)


def _built_in(processor: Any) -> bool:
    tokenizer = getattr(processor, "tokenizer", processor)
    return all(len(tokenizer(mark, add_special_tokens=False)["input_ids"]) == 1 for mark in _WRITTEN.values())


def _text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt's text, or the text of all its messages."""
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") or "" for message in prompt]
    return "\n".join(
        content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in content)
        for content in contents
    )


def _named(marks: Sequence[str]) -> str:
    return " and ".join(f"`{mark}`" for mark in marks)
