"""What a run is told, before its first step, about the form that the standard rewards look for."""

from typing import Any

from cppo.data import RecordSource, first_prompts, parse_spec
from cppo.data.spec import TaskSpec
from cppo.errors import tell
from cppo.evaluation import EvalResult
from cppo.recipes import TrainOptions
from cppo.training.trainer import CPPOTrainer


def warn_of_prompts(trainer: CPPOTrainer, options: TrainOptions, train: RecordSource) -> None:
    """Say where no response will have the form, since nothing asks for it, or decoding drops it.

    Generated tasks ask for nothing: they are for models that were taught the form.
    """
    watch, specs = trainer.form_watch, [options.data] if isinstance(options.data, str) else options.data
    prompts: list[Any] = first_prompts(train, options.system_prompt)
    if all(isinstance(parse_spec(spec), TaskSpec) for spec in specs):
        prompts = [" ".join(watch.marks)]
    if watch.marks and (causes := watch.form.causes(prompts, marks=watch.marks)):
        tell(f"warning: the rewards look for {' and '.join(watch.marks)}, but {'; '.join(causes)}")


def warn_of_answers(trainer: CPPOTrainer, options: TrainOptions, asked: RecordSource, before: EvalResult) -> None:
    """Say why no answer before training had the form, if a reward looks for it."""
    watch = trainer.form_watch
    if before.format_rate or not watch.marks:
        return
    responses = [response for item in before.items for response in item.responses]
    if causes := watch.form.causes(first_prompts(asked, options.system_prompt), responses, watch.marks):
        tell(f"warning: format 0 % before training: {'; '.join(causes)}")
