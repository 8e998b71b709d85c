"""The trainer's part of the model card: what it knows of its model, gathered for `cppo.reports.model_card`."""

from collections.abc import Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from cppo.assets import MICRO_DIR
from cppo.fields import plain_default
from cppo.files import replace_text
from cppo.reports.model_card import RunFacts, TrainedModel, model_card, portable
from cppo.training import package_versions
from cppo.training.checkpoint import ResumableGRPOTrainer
from cppo.training.config import CPPOConfig

CITATION = """@article{cppo2026,
  title   = {CPPO: Contrastive Perception for Vision Language Policy Optimization},
  journal = {arXiv preprint arXiv:2601.00501},
  year    = {2026},
}"""


class CardedTrainer(ResumableGRPOTrainer):
    """Writes the card beside every model that it saves.

    Attributes:
        run_facts: what a run from a recipe knows beyond its trainer, and puts here.
    """

    args: CPPOConfig
    fallbacks: list[str]
    run_facts: RunFacts | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # A checkpoint has none, but PEFT writes one of its own there. TRL asks for the card of the whole run then.
        if not _internal_call or is_peft_model(self.model):
            self._write_card(output_dir or str(self.args.output_dir))

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        datasets = [] if dataset_name is None else [dataset_name]
        self._write_card(str(self.args.output_dir), model_name, datasets, [tags] if isinstance(tags, str) else tags)

    def _write_card(
        self, folder: str, name: str | None = None, datasets: list[str] | None = None, tags: list[str] | None = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        name = name or (self.args.hub_model_id or str(Path(folder).resolve())).split("/")[-1]
        card = model_card(self._trained_model(), self.run_facts, name, datasets or [], tags or [])
        replace_text(Path(folder, "README.md"), card)

    def _trained_model(self) -> TrainedModel:
        args, rows = self.args, self.train_dataset
        return TrainedModel(
            base=_base_name(self.accelerator.unwrap_model(self.model).config.name_or_path or "unknown"),
            is_adapter=is_peft_model(self.model),
            steps=self.state.global_step,
            log_history=self.state.log_history,
            train_rows=len(rows) if isinstance(rows, Sized) else None,
            method=args.method,
            loss_type=args.loss_type,
            max_completion_length=args.max_completion_length,
            changed_options=_changed(args),
            citation=CITATION if args.perception_sink == "contrast" else None,
            versions=package_versions(),
            fallbacks=self.fallbacks,
        )


def _base_name(source: str) -> str:
    """`micro`, a name on the hub, or the name of a folder."""
    if Path(source) == MICRO_DIR:
        return "micro"
    return Path(source).name if Path(source).exists() else portable(source)


def _changed(args: CPPOConfig) -> dict[str, Any]:
    """The fields of a configuration that differ from their defaults, of those that YAML can hold."""
    changed = {}
    for one in fields(args):
        value = getattr(args, one.name)
        if value != plain_default(one) and isinstance(value, (bool, int, float, str, list)):
            changed[one.name] = str(value.value) if hasattr(value, "value") else value
    return changed
