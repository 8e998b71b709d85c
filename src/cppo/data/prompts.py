"""Prompts: a text, or chat messages that end with the user's."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

Prompt = str | list[dict[str, Any]]


def with_suffix(prompt: Prompt, suffix: str | None) -> Prompt:
    """The prompt with `suffix` after its last (user) message, separated by a space; unchanged without a suffix."""
    if not suffix:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt} {suffix}"
    *earlier, last = prompt
    content = last["content"]
    if isinstance(content, str):
        content = f"{content} {suffix}"
    elif content[-1]["type"] == "text":
        content = [*content[:-1], {**content[-1], "text": f"{content[-1]['text']} {suffix}"}]
    else:
        content = [*content, {"type": "text", "text": f" {suffix}"}]
    return [*earlier, {**last, "content": content}]


def chat_messages(prompt: Prompt, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """The prompt as new chat messages; `system_prompt` comes first unless the prompt has its own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else deepcopy(prompt)
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    structured = isinstance(messages[-1]["content"], list)
    content = [{"type": "text", "text": system_prompt}] if structured else system_prompt
    return [{"role": "system", "content": content}, *messages]


def question_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of the last message: the question without system prompt and placeholders."""
    content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
