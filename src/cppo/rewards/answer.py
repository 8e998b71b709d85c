"""The packaged rewards: is the boxed answer right, and has the response the asked-for form?"""

from collections.abc import Callable, Sequence
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.rewards.extract import MAX_RESPONSE_CHARS, completion_text, extract_answer
from cppo.rewards.match import answers_match

_OPENING, _CLOSING = "<think>", "</think>"


def get_accuracy_reward(tolerance: float = 0.0) -> Callable[..., list[float]]:
    """`accuracy_reward` with a tolerance for numbers, as a fraction of the expected one.

    Raises UserError for a tolerance outside [0, 1).
    """
    if not 0 <= tolerance < 1:
        raise UserError(f"tolerance = {tolerance:g} must be in [0, 1)")

    def accuracy_reward(
        completions: Sequence[Any],
        answer: Sequence[Any],
        choices: Sequence[Sequence[str] | None] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        r"""1.0 for each completion whose last `\boxed{...}` equals its answer (`answers_match`), else 0.0.

        completions: texts or chats, B of them. answer: the B expected answers (numbers are taken as their text).
        choices: of multiple-choice questions the texts of the options; of others None or none. The other columns that
        TRL passes are ignored. Raises UserError if the answers do not fit the completions.
        """
        if len(answer) != len(completions):
            raise UserError(
                f"accuracy_reward: {len(completions)} completions, but {len(answer)} values in column 'answer'"
            )
        options = [()] * len(answer) if choices is None else [tuple(row or ()) for row in choices]
        verdicts: dict[tuple[str, str, tuple[str, ...]], bool] = {}
        rewards = []
        for row, (completion, expected) in enumerate(zip(completions, answer, strict=True)):
            if expected is None:
                raise UserError(f"accuracy_reward: completion {row} has no answer; fill column 'answer'")
            case = (extract_answer(completion_text(completion)) or "", str(expected), options[row])
            if case not in verdicts:
                verdicts[case] = answers_match(*case[:2], tolerance=tolerance, choices=case[2])
            rewards.append(float(verdicts[case]))
        return rewards

    return accuracy_reward


accuracy_reward = get_accuracy_reward()


def get_format_reward(form: str = "strict") -> Callable[..., list[float]]:
    r"""The reward for the asked-for form: 1.0 for each completion that has it, else 0.0.

    form:
        "strict": after leading white space the text begins with `<think>`. `<think>` and `</think>` each occur exactly
        once, in this order. A `\boxed{...}` with balanced braces that is not empty follows. Other text may stand around
        the box. A text of more than 1,000,000 characters gets 0.0.
        "published": the whole text matches `<think>.*</think>.*\boxed\{.*\}.*`, where the dot matches every character
        (the code beside arXiv 2601.00501). No white space leads. Further tags, an empty box and one whose braces do
        not balance pass.

    Tags are case-sensitive. Both take time linear in the text. Raises UserError for another form.
    """
    if form not in _FORMS:
        raise UserError(f"form = {form!r} is unknown; {choose_one(str(form), list(_FORMS))}")
    has_form = _FORMS[form]

    def format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """1.0 for each completion of the form, else 0.0.

        completions: texts or chats, B of them. The other columns that TRL passes are ignored.
        """
        return [float(has_form(completion_text(completion))) for completion in completions]

    return format_reward


def _is_strict(text: str) -> bool:
    if len(text) > MAX_RESPONSE_CHARS or not text.lstrip().startswith(_OPENING):
        return False
    if text.count(_OPENING) != 1 or text.count(_CLOSING) != 1:
        return False
    return bool(extract_answer(text.partition(_CLOSING)[2]))


def _is_published(text: str) -> bool:
    """What a backtracking regular expression would find out in up to cubic time: each part after the one before."""
    place = 0 if text.startswith(_OPENING) else -1
    for part in (_OPENING, _CLOSING, "\\boxed{", "}"):
        if place < 0 or (place := text.find(part, place)) < 0:
            return False
        place += len(part)
    return True


_FORMS = {"strict": _is_strict, "published": _is_published}

format_reward = get_format_reward()
