"""What a run shows while it trains: a bar and a few samples on a terminal, else plain lines."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

PROGRESS_LINES = 20
"""How many progress lines a run prints where there is no terminal to draw a bar on."""
TABLE_ROWS, LEAST_COLUMNS = 3, 48
UNDERLINED, PLAIN = "\x1b[4m", "\x1b[24m"
RL_SHOWN = {"reward": "reward", "rewards/accuracy_reward/mean": "accuracy", "perception/cpl": "cpl"}
SFT_SHOWN = {"loss": "loss", "mean_token_accuracy": "token accuracy"}


class Progress:
    """Progress on stderr.

    Args:
        quiet: plain lines on a terminal too.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm | None = None

    def begin(self, step: int, last: int) -> None:
        """Draw the bar, if there is a terminal to draw it on."""
        if sys.stderr.isatty() and not self._quiet:
            self._bar = tqdm(total=last, initial=step, desc="train", unit="step", leave=False, dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, last: int, logs: Mapping[str, Any]) -> None:
        """What a step logged: beside the bar, or now and then as a line."""
        shown = progress_text(logs)
        if self._bar is not None:
            self._bar.set_postfix(shown)
        elif is_milestone(step, last, PROGRESS_LINES):
            print(f"step {step}/{last}  {progress_line(shown)}", file=sys.stderr, flush=True)

    def show_evaluation(self, step: int, last: int, logs: Mapping[str, Any]) -> None:
        """What an evaluation during training found, as a line."""
        shown = progress_text({name.removeprefix("eval_"): value for name, value in logs.items()})
        tqdm.write(f"step {step}/{last}  evaluation: {progress_line(shown)}", file=sys.stderr)

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A short table above the bar; nothing where there is no bar."""
        if self._bar is not None and samples:
            table = sample_table(samples[:TABLE_ROWS], shutil.get_terminal_size().columns)
            self._bar.write("\n".join(table), file=sys.stderr)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def progress_text(logs: Mapping[str, Any]) -> dict[str, str]:
    """What the progress line shows of a step: an RL step's rewards, else the loss (which says little of an RL step)."""
    names = RL_SHOWN if "reward" in logs else SFT_SHOWN
    return {label: f"{logs[name]:.3f}" for name, label in names.items() if isinstance(logs.get(name), float)}


def progress_line(shown: Mapping[str, str]) -> str:
    """The same as text."""
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def is_milestone(step: int, last: int, times: int) -> bool:
    """Whether `step` is the first, the last, or one of about `times` evenly spaced steps up to `last`."""
    return step in (1, last) or step % max(1, last // times) == 0


def sample_table(samples: Sequence[Mapping[str, Any]], columns: int) -> list[str]:
    """Lines of at most so many columns: reward, question, expected answer, and the response with its perception tokens
    underlined.

    Args:
        samples: as `cppo.runs.recorder.sample_record` gives them. Their control characters are not shown.
    """
    columns = max(columns, LEAST_COLUMNS)
    question, answer = columns // 4, 10
    response = columns - question - answer - 14
    heading = f"response, step {samples[0]['step']}"[:response]
    lines = [f"  {'reward':>6}  {'question':<{question}}  {'expected':<{answer}}  {heading}"]
    for sample in samples:
        reward = "none" if sample["reward"] is None else f"{sample['reward']:.2f}"
        lines.append(
            f"  {reward:>6}  {_cut(sample['prompt'], question)}  {_cut(str(sample['answer']), answer)}  "
            + _marked(sample["completion_tokens"], sample["perception"], response)
        )
    return lines


def _cut(text: str, width: int) -> str:
    """Text of a model or data on exactly so many columns, without what could steer a terminal."""
    clean = _printable(" ".join(text.split()))
    return f"{clean:<{width}}" if len(clean) <= width else clean[: width - 1] + "\u2026"


def _marked(tokens: Sequence[str], selected: Sequence[bool], width: int) -> str:
    parts, left = [], width
    for token, marked in zip(tokens, selected, strict=True):
        text = _printable(token)[:left]
        left -= len(text)
        parts.append(f"{UNDERLINED}{text}{PLAIN}" if marked and text else text)
    return "".join(parts)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
