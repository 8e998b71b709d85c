"""Chat messages and the images inside them."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

Messages = list[dict[str, Any]]


def embedded_images(prompt: Messages | str) -> list[Image.Image]:
    """The images inside chat messages, in order; empty for a plain-text prompt."""
    if isinstance(prompt, str):
        return []
    contents = [message["content"] for message in prompt if isinstance(message.get("content"), list)]
    return [part["image"] for content in contents for part in content if _is_image(part)]


def replace_images(prompt: Messages | str, images: Sequence[Image.Image]) -> Messages | str:
    """A copy of chat messages with other images in place of the embedded ones; plain text unchanged."""
    if isinstance(prompt, str):
        return prompt
    following = iter(images)

    def new_part(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(following)} if _is_image(part) else part

    return [
        {**message, "content": [new_part(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def without_images(prompt: Messages | str) -> Messages | str:
    """A copy of chat messages without the images inside them; plain text unchanged."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": [part for part in message["content"] if part.get("type") != "image"]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" and part.get("image") is not None


def prompt_text(prompt: Messages | str) -> Messages | str:
    """A prompt without its images: text, or the roles and contents of its messages."""
    return prompt if isinstance(prompt, str) else [_text_of(message) for message in prompt]


def _text_of(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = [{key: value for key, value in part.items() if key != "image"} for part in content]
    return {"role": message.get("role"), "content": content}
