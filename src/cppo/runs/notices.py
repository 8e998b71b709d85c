"""Warnings before the first step: what the data, prompts and first answers lack."""

from typing import TYPE_CHECKING, Any

from cppo.data import RecordSource, first_prompts, parse_spec
from cppo.data.spec import TaskSpec
from cppo.errors import tell
from cppo.options import TrainOptions

if TYPE_CHECKING:
    from cppo.evaluation import EvalResult
    from cppo.training.early_signs import FormWatch

IMAGE_PROBE = 100
"""Number of first rows that are checked for images."""


def warn_of_no_images(source: RecordSource) -> None:
    """Warn if the perception loss would have nothing to do."""
    if not any(source[i].images for i in range(min(len(source), IMAGE_PROBE))):
        tell(
            f"warning: none of the first rows of {source.name} has an image, and the perception loss needs "
            "images; is the column named `images`, or mapped with --columns?"
        )


def warn_of_unread(source: RecordSource) -> None:
    """Warn of columns that look like misspelt names."""
    for line in source.unread:
        tell(f"warning: {source.name}: nothing reads {line}")


def warn_of_shared_files(options: TrainOptions) -> None:
    """Warn if held-out data are training data; a task or a data set with splits has others under the same name."""
    given = ([one] if isinstance(one, str) else one or [] for one in (options.data, options.eval_data))
    shared = [spec for spec in set.intersection(*map(set, given)) if spec.endswith((".jsonl", ".parquet"))]
    if shared:
        tell(f"warning: {', '.join(sorted(shared))} is both data and eval_data: the run trains on its held-out data")


def warn_of_prompts(watch: "FormWatch", options: TrainOptions, train: RecordSource) -> None:
    """Warn if no response can have the form, since nothing asks for it, or decoding drops it.

    Generated tasks do not ask for it: their models were trained on the form.
    """
    specs = [options.data] if isinstance(options.data, str) else options.data
    prompts: list[Any] = first_prompts(train, options.system_prompt)
    if all(isinstance(parse_spec(spec), TaskSpec) for spec in specs):
        prompts = [" ".join(watch.marks)]
    if watch.marks and (causes := watch.form.causes(prompts, marks=watch.marks)):
        tell(f"warning: the rewards look for {' and '.join(watch.marks)}, but {'; '.join(causes)}")


def warn_of_answers(watch: "FormWatch", options: TrainOptions, asked: RecordSource, before: "EvalResult") -> None:
    """Warn with the reason if no answer before training had the form that a reward looks for."""
    if before.format_rate or not watch.marks:
        return
    responses = [response for item in before.items for response in item.responses]
    if causes := watch.form.causes(first_prompts(asked, options.system_prompt), responses, watch.marks):
        tell(f"warning: format 0 % before training: {'; '.join(causes)}")
