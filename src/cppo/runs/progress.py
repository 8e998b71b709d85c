"""A run's display during training: a bar and a few samples on a terminal, else plain lines."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cppo.progress import Progress, say, time_left
from cppo.reports.curves import reward_label

PROGRESS_LINES = 20
"""Number of progress lines of a run without a terminal."""
TABLE_ROWS, LEAST_COLUMNS = 3, 48
UNDERLINED, PLAIN = "\x1b[4m", "\x1b[24m"
SFT_SHOWN = {"loss": "loss", "mean_token_accuracy": "token accuracy"}


class TrainProgress:
    """Progress of training on stderr.

    Args:
        quiet: a few plain lines alone, on a terminal too.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._work: Progress | None = None
        self._lines = Milestones(PROGRESS_LINES)

    def begin(self, step: int, last: int) -> None:
        """Training begins, or resumes after `step`."""
        self._work = Progress(total=last, initial=step, desc="train", unit="steps", quiet=self._quiet)

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._work is not None:
            self._work.update(step - self._work.n)

    def show(self, step: int, last: int, logs: Mapping[str, Any]) -> None:
        """Show a step's logged values: beside the bar, or now and then as a line."""
        shown = progress_text(logs)
        if self._work is not None and self._work.is_bar:
            self._work.set_postfix(shown)
        elif self._lines.reached(step, last):
            left = time_left(self._work.format_dict) if self._work is not None and step < last else ""
            say("  ".join(filter(None, [f"step {step}/{last}", progress_line(shown), left])))

    def show_evaluation(self, step: int, last: int, logs: Mapping[str, Any]) -> None:
        """Print an evaluation's results during training as a line."""
        shown = progress_text({name.removeprefix("eval_"): value for name, value in logs.items()})
        say(f"step {step}/{last}  evaluation: {progress_line(shown)}")

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A short table above the bar; nothing without a bar."""
        if self._work is not None and self._work.is_bar and samples:
            table = sample_table(samples[:TABLE_ROWS], shutil.get_terminal_size().columns)
            self._work.write("\n".join(table), file=sys.stderr)

    def end(self) -> None:
        """Remove the bar."""
        if self._work is not None:
            self._work.close()
            self._work = None


def progress_text(logs: Mapping[str, Any]) -> dict[str, str]:
    """What the progress line shows of a step: an RL step's rewards and CPL, else the loss (which says little of an RL
    step). A single reward is the reward itself.
    """
    names = SFT_SHOWN
    if "reward" in logs:
        rewards = {name: label for name in logs if (label := reward_label(name))}
        names = {"reward": "reward", **(rewards if len(rewards) > 1 else {}), "perception/cpl": "cpl"}
    return {label: f"{logs[name]:.3f}" for name, label in names.items() if isinstance(logs.get(name), float)}


def progress_line(shown: Mapping[str, str]) -> str:
    """The progress line's values as text."""
    return "  ".join(f"{name} {value}" for name, value in shown.items())


class Milestones:
    """About `times` evenly spaced steps of a run, the first and the last that it logs among them."""

    def __init__(self, times: int) -> None:
        self._times, self._next = times, 0

    def reached(self, step: int, last: int) -> bool:
        """Whether a logged step is one, or the first after one that was not logged."""
        if step < min(self._next, last):
            return False
        every = max(1, last // self._times)
        self._next = (step // every + 1) * every
        return True


def sample_table(samples: Sequence[Mapping[str, Any]], columns: int) -> list[str]:
    """Lines of at most `columns` columns: reward, question, expected answer, response (perception tokens underlined).

    Args:
        samples: from `cppo.runs.recorder.sample_record`. Their control characters are not shown.
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
    """Text of a model or data on exactly `width` columns, without characters that control a terminal."""
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
