"""The model of `cppo eval` and its answers: loaded once when it is needed, in all processes of a launcher together."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cppo.cli.checks import launched_processes
from cppo.cli.eval_report import category_text
from cppo.cli.response_file import ResponseFile
from cppo.data import RecordSource

if TYPE_CHECKING:
    from cppo.evaluation import Condition, EvalResult

ASKED = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "system_prompt", "tolerance")
"""The settings that `evaluate` takes."""


class Answering:
    """The model of a command, and the processes that let it answer together.

    Attributes:
        processes: those of the launcher, else this one alone.
        dtype: of the weights.
    """

    def __init__(self, arguments: Any) -> None:
        """Join the other processes. Raises UserError where they have no device each."""
        from cppo.evaluation import join_processes, placement

        device, self.dtype = placement(arguments.device, arguments.dtype)
        self.processes, self._device = join_processes(device, launched_processes())
        self._arguments = arguments

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from cppo.evaluation import load_model

        return load_model(self._arguments.model, device=self._device, dtype=self.dtype)

    def answer(
        self,
        source: RecordSource,
        conditions: "Sequence[Condition]",
        settings: Mapping[str, Any],
        responses: str | None,
        identity: Mapping[str, Any],
        right: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
    ) -> "dict[str, EvalResult]":
        """Answer the records under each condition, by its name; what the response file holds is not answered again.

        Every process gets the results; the first alone reads and writes the file and shows the progress.

        Args:
            settings: ASKED of them go to `evaluate`.
            responses: the response file, or None.
            identity: what must be the same for responses to go into that file.
            right: as `evaluate` takes it.
        """
        stored = ResponseFile(responses, identity) if responses and self.processes.is_first else None
        known = {one.name: stored.known(one.name, source) if stored else () for one in conditions}
        known = self.processes.from_first(known)
        return {one.name: self._answer(source, one, settings, known[one.name], stored, right) for one in conditions}

    def _answer(
        self,
        source: RecordSource,
        condition: "Condition",
        settings: Mapping[str, Any],
        known: Sequence[Any],
        stored: ResponseFile | None,
        right: Callable[[str, Sequence[str]], Sequence[float]] | None,
    ) -> "EvalResult":
        from cppo.evaluation import check_marks, evaluate

        model, processor = self._model if len(known) < len(source) else (None, None)
        if processor is not None:
            texts = {name: settings[name] for name in ("system_prompt", "prompt_suffix")}
            check_marks(processor, [source], **texts)
        name, indices = condition.name, iter(range(len(known), len(source)))

        def keep(record: Any, item: Any) -> None:
            if stored:
                stored.append(name, record, item, categories(source, next(indices)))

        silent = None if self.processes.is_first else True  # None: on a terminal alone
        with tqdm(total=len(source), initial=len(known), desc=name, unit="item", leave=False, disable=silent) as bar:
            return evaluate(
                model,
                processor,
                source,
                condition=condition,
                batch_size=self._arguments.batch_size,
                known=known,
                keep=keep,
                progress=bar.update,
                processes=self.processes,
                right=right,
                **{option: settings[option] for option in ASKED},
            )


def categories(source: RecordSource, index: int) -> dict[str, str]:
    """The categories of a record, one for each column of --by."""
    return {name: category_text(value) for name, value in source.extras(index).items()}
