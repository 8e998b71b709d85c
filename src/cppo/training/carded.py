"""A trainer that writes the model card of `cppo.training.model_card` beside every model that it saves."""

from pathlib import Path

from cppo.training.model_card import RunFacts, model_card
from cppo.training.resume import ResumableGRPOTrainer


class CardedTrainer(ResumableGRPOTrainer):
    """`run_facts` is what a run from a recipe knows beyond its trainer, and puts here for the card."""

    run_facts: RunFacts | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # not a checkpoint's: TRL asks for the card of the whole run then
            self._write_card(output_dir or self.args.output_dir)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        datasets = [] if dataset_name is None else [dataset_name]
        self._write_card(self.args.output_dir, model_name, datasets, [tags] if isinstance(tags, str) else tags or [])

    def _write_card(
        self, folder: str, name: str | None = None, datasets: list[str] | None = None, tags: list[str] | None = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        name = name or (self.args.hub_model_id or str(Path(folder).resolve())).split("/")[-1]
        card = model_card(self, self.run_facts, name, datasets or [], tags or [])
        Path(folder, "README.md").write_text(card, encoding="utf-8")
