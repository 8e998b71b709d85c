"""Batches of rollouts: TRL's rules for whole groups, and the options that satisfy them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

from cppo.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A generation batch over all processes.

    Attributes:
        group: rollouts of a prompt.
        device: rollouts of a micro-batch on each process.
        steps: micro-batches that are generated together.
        processes: number of training processes.
        by_rollouts: whether `generation_batch_size` sets the size instead of `steps_per_generation`; TRL accepts one.
    """

    group: int
    device: int
    steps: int
    processes: int
    by_rollouts: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], processes: int) -> "Batch":
        """The batch of TRL's options, defaults included, in whole micro-batches."""
        device, rollouts = options["per_device_train_batch_size"], options["generation_batch_size"]
        steps = options["steps_per_generation"] or options["gradient_accumulation_steps"]
        if rollouts:
            steps = max(rollouts // (device * processes), 1)
        return cls(options["num_generations"] or 1, device, steps, processes, bool(rollouts))

    @property
    def rollouts(self) -> int:
        """Rollouts on all processes."""
        return self.processes * self.device * self.steps

    @property
    def prompts(self) -> int:
        """Prompts on all processes."""
        return self.rollouts // self.group

    def fits(self, rows: int | None) -> bool:
        """Whether groups are whole and there are enough rows; None: any number of rows."""
        return self.rollouts % self.group == 0 and (rows is None or self.prompts <= rows)

    def options(self) -> dict[str, int]:
        """The options that describe the batch."""
        size = {"generation_batch_size": self.rollouts} if self.by_rollouts else {"steps_per_generation": self.steps}
        return {"num_generations": self.group, "per_device_train_batch_size": self.device, **size}

    def mended(self, rows: int | None) -> "Batch | None":
        """The batch with the smallest change that fits this many rows; None where there is none.

        It changes the size of micro-batches, then the number generated together, then both, then the size of groups.
        """
        return next((one for one in self._candidates() if one.fits(rows)), None)

    def _candidates(self) -> Iterator["Batch"]:
        unit = self.group // gcd(self.group, self.processes * self.steps)
        if not self.by_rollouts:
            yield replace(self, device=max(self.device // unit, 1) * unit)
        for group in (self.group, *range(self.group - 1, 1, -1)):
            yield from (replace(self, group=group, steps=steps) for steps in range(self.steps, 0, -1))
            sizes = [(device, steps) for device in range(1, self.device) for steps in range(1, self.steps + 1)]
            for device, steps in sorted(sizes, key=lambda size: (-size[0] * size[1], -size[0])):
                yield replace(self, group=group, device=device, steps=steps)
            yield replace(self, group=group, steps=group // gcd(group, self.device * self.processes))


def check_group_sizes(options: Mapping[str, Any], processes: int, rows: Callable[[], int] | None = None) -> None:
    """Raise UserError unless batches consist of whole groups, as TRL requires.

    Args:
        options: TRL's options, defaults included.
        processes: number of training processes.
        rows: counts the rows to train on; called only for a suggestion, which must fit them.

    Raises:
        UserError: a batch splits a group; the message names every option to give.
    """
    batch, found = Batch.of(options, processes), []
    given = batch.options()
    name, batches, unit = "per_device_train_batch_size", processes * batch.steps, batch.group
    if batch.by_rollouts:
        name, batches, unit = "generation_batch_size", 1, lcm(batch.group, batch.device * processes)
        given[name] = options[name]
    if given[name] * batches % unit:
        found.append(f"{name} = {given[name]}: {batches} x {given[name]} rollouts must be a multiple of {unit}")
    evaluates, name = options["eval_strategy"] != "no", "per_device_eval_batch_size"
    size, group = options[name], options["num_generations_eval"] or batch.group
    if evaluates and size * processes % group:
        found.append(f"{name} = {size}: {processes} x {size} rollouts must be a multiple of {group}")
    if not found:
        return
    better = batch.mended(None if rows is None else rows())
    cure = {} if better is None else {name: value for name, value in better.options().items() if value != given[name]}
    if evaluates and better is not None:
        group = options["num_generations_eval"] or better.group
        unit = group // gcd(group, processes)
        cure |= {name: max(size // unit, 1) * unit} if size % unit else {}
    remedy = _words(cure) or f"at least {lcm(batch.group, processes) // batch.group} rows"
    raise UserError(f"{'; '.join(found)}, so that groups of num_generations are whole; give {remedy}")


def check_rows(name: str, rows: int, batch: Batch) -> None:
    """Raise UserError where the data called `name` have fewer rows than a generation batch has prompts.

    The message names every option to give.
    """
    if rows >= batch.prompts:
        return
    better, given = batch.mended(rows), batch.options()
    cure = {} if better is None else {name: value for name, value in better.options().items() if value != given[name]}
    raise UserError(
        f"{name}: {rows} usable rows are fewer than the {batch.prompts} prompts of a generation batch "
        f"({batch.rollouts} rollouts in groups of {batch.group}); give "
        f"{f'{_words(cure)}, or ' if cure else ''}at least {batch.prompts} rows"
    )


def _words(options: Mapping[str, int]) -> str:
    """Options as written on the command line."""
    return " ".join(f"--{name} {value}" for name, value in options.items())
