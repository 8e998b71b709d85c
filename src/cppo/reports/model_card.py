"""The model card, README.md beside the weights: data, method, recipe, metrics, how to load and evaluate the model.

Names of models, data and options come from users and appear in YAML, Markdown and Python: each is written as that
language's own literal, and absolute paths are shortened to their last part.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from cppo.assets import MICRO_DIR
from cppo.data import hub_dataset, with_suffix
from cppo.fields import plain_default
from cppo.methods import get_method

TAGS = ("cppo", "trl", "grpo", "reinforcement-learning", "vision-language")
TRAINING_METRICS = ("reward", "rewards/accuracy_reward/mean", "rewards/format_reward/mean", "perception/cpl")
"""Metrics of the last logged step on the card."""
CITATION = """@article{cppo2026,
  title   = {CPPO: Contrastive Perception for Vision Language Policy Optimization},
  journal = {arXiv preprint arXiv:2601.00501},
  year    = {2026},
}"""
GRPO_CITATION = """@article{shao2024deepseekmath,
    title        = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
    author       = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and others},
    year         = 2024,
    eprint       = {arXiv:2402.03300},
}"""
_MACHINE_OPTIONS = {"output_dir", "logging_dir", "run_name", "report_to", "hub_model_id", "project"}
_SECRET = re.compile(r"(token|key|password|secret)$")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/])")


@dataclass(frozen=True)
class TrainedModel:
    """A model, with its trainer's facts.

    Attributes:
        base: the model that training started from: "micro", a name on the hub or the name of a folder.
        is_adapter: whether it is a PEFT adapter of `base`.
        steps: optimizer steps done.
        log_history: the trainer's, a mapping for each logged step.
        train_rows: number of training rows; None for a stream.
        method, loss_type, max_completion_length: as in `CPPOConfig`.
        changed_options: fields of the configuration that are not the defaults.
        citation: BibTeX of the trainer's own paper, if `method` is one of its methods.
        versions: of each package that the numbers depend on.
        fallbacks: what was done in a slower or coarser way, one line each.
    """

    base: str
    is_adapter: bool
    steps: int
    log_history: Sequence[Mapping[str, Any]]
    train_rows: int | None
    method: str
    loss_type: str
    max_completion_length: int | None
    changed_options: Mapping[str, Any]
    citation: str | None
    versions: Mapping[str, str]
    fallbacks: Sequence[str]


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run from a recipe, beyond its trainer's.

    Attributes:
        recipe: the resolved options (`cppo.recipes.resolved_options`).
        rows: number of training rows. `skipped_rows` were unusable, `other_images_rows` had another number of images
            than requested, `long_rows` too many prompt tokens.
        summary: the contents of `summary.json`, once the run has finished.
    """

    recipe: Mapping[str, Any]
    rows: int
    skipped_rows: int
    other_images_rows: int
    long_rows: int
    summary: Mapping[str, Any] = field(default_factory=dict)

    def specs(self, option: str) -> list[str]:
        """The SPECs of `data` or `eval_data`."""
        given = self.recipe.get(option) or []
        return [given] if isinstance(given, str) else list(given)


def model_card(
    model: TrainedModel, facts: RunFacts | None, name: str, datasets: Sequence[str], tags: Sequence[str]
) -> str:
    """The card of a model, with its front matter.

    Args:
        name: of the model, for the title.
        datasets: names on the hub for the front matter, beside those among the run's SPECs.
    """
    specs = facts.specs("data") if facts else []
    on_hub = [*datasets, *(found for spec in specs if (found := hub_dataset(spec)))]
    front = ModelCardData(
        # The micro VLM is part of this package; the licences of other models are not known here.
        license="apache-2.0" if model.base == "micro" else None,
        library_name="peft" if model.is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=model.base if "/" in model.base else None,
        datasets=list(dict.fromkeys(on_hub)) or None,
        model_name=name,
        tags=sorted({*TAGS, *tags}),
    )
    sections = [
        f"# {_plain(name)}",
        _origin(model),
        "## Metrics\n\n" + _metrics(model, facts),
        "## Use\n\n" + _fenced(_snippet(model, facts), "python") + "\n\n" + _evaluation(facts),
        "## Data\n\n" + _data(model, facts),
        "## Method\n\n" + _method(model),
        "## Recipe\n\n" + _recipe(model, facts),
        "## Versions\n\n" + ", ".join(f"{package} {version}" for package, version in model.versions.items()),
        *(_plain(f"Fallback: {line}") for line in model.fallbacks),
    ]
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def portable(value: Any) -> Any:
    """`value` with absolute paths shortened to their last part, since they reveal facts about a machine."""
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    return [portable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _origin(model: TrainedModel) -> str:
    base = model.base
    what = "A LoRA adapter, trained on top of" if model.is_adapter else "A vision-language model, fine-tuned from"
    source = f"[{base}](https://huggingface.co/{base})" if "/" in base else _code(base)
    if base == "micro":
        source = "`micro`, the small model that the Python package `cppo` contains"
    return f"{what} {source}, with reinforcement learning by `cppo` ({model.steps:,} steps)."


def _metrics(model: TrainedModel, facts: RunFacts | None) -> str:
    summary = facts.summary if facts else {}
    labels = {"before": "before training", "after": "after training", "blank": "after, grey image"}
    measured = [(label, summary[key]) for key, label in labels.items() if key in summary]
    parts = []
    if measured and facts:
        held_out = ", ".join(_code(portable(spec)) for spec in facts.specs("eval_data"))
        rows = [
            f"| {label} | {_percent(one['accuracy'])} | {_interval(one['accuracy_ci95'])} "
            f"| {_percent(one['format_rate'])} |"
            for label, one in measured
        ]
        parts.append(f"{measured[0][1]['n']:,} held-out items of {held_out}, greedy answers, 95 % intervals.")
        parts.append("\n".join(["| | accuracy | interval | format |", "|---|---|---|---|", *rows]))
    if "gain" in summary:
        gain = summary["gain"]
        low, high = 100 * gain["low"], 100 * gain["high"]
        parts.append(f"Gain on the same items: {100 * gain['mean']:+.1f} points [{low:+.1f}, {high:+.1f}].")
    if not measured:
        parts.append("No held-out accuracy was measured.")
    logged = [entry for entry in model.log_history if "reward" in entry]
    if logged:
        shown = [
            f"`{name}` {logged[-1][name]:.3f}" for name in TRAINING_METRICS if isinstance(logged[-1].get(name), float)
        ]
        parts.append(f"Training, step {logged[-1]['step']:,}: {', '.join(shown)}.")
    return "\n\n".join(parts)


def _snippet(model: TrainedModel, facts: RunFacts | None) -> str:
    """Python that loads the model and asks it about an image."""
    base, adapter = model.base, model.is_adapter
    recipe = facts.recipe if facts else {}
    prompt, suffix = recipe.get("system_prompt"), recipe.get("prompt_suffix")
    question = with_suffix("What does the image show?", suffix)
    system = [f'    {{"role": "system", "content": [{{"type": "text", "text": {prompt!r}}}]}},'] if prompt else []
    load = ["model = AutoModelForImageTextToText.from_pretrained(folder)"]
    if adapter:
        source = 'resolve_model("micro")' if base == "micro" else repr(base)
        load = [
            f"base = AutoModelForImageTextToText.from_pretrained({source})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    imports = [
        *(["from cppo.assets import resolve_model"] if adapter and base == "micro" else []),
        *(["from peft import PeftModel"] if adapter else []),
        "from PIL import Image",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
    ]
    return "\n".join(
        [
            *imports,
            "",
            'folder = "."  # the folder of this file, or the name on the hub',
            "processor = AutoProcessor.from_pretrained(folder)",
            *load,
            'image = Image.open("image.png").convert("RGB")',
            f'question = {{"type": "text", "text": {question!r}}}',
            "messages = [",
            *system,
            '    {"role": "user", "content": [{"type": "image", "image": image}, question]},',
            "]",
            "inputs = processor.apply_chat_template(",
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
            ")",
            f"answer = model.generate(**inputs, max_new_tokens={model.max_completion_length})",
            'print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _evaluation(facts: RunFacts | None) -> str:
    specs = [portable(spec) for spec in facts.specs("eval_data") or facts.specs("data")] if facts else []
    command = ["cppo", "eval", "--model", ".", "--data", *(specs or ["test.jsonl"]), "--blank"]
    if columns := facts.recipe.get("columns") if facts else None:
        # JSON is YAML too, on one line.
        command += ["--columns", columns if isinstance(columns, str) else json.dumps(columns)]
    return "Accuracy with an interval, with and without the image (here, in the folder of this file):\n\n" + _fenced(
        shlex.join(command), "sh"
    )


def _data(model: TrainedModel, facts: RunFacts | None) -> str:
    if facts is None:
        rows = "A stream of rows" if model.train_rows is None else f"{model.train_rows:,} rows"
        return f"{rows}; the trainer does not know their source."
    lines = [f"- trained on: {_code(portable(spec))}" for spec in facts.specs("data")]
    lines += [f"- held out: {_code(portable(spec))}" for spec in facts.specs("eval_data")]
    counts = f"{facts.rows:,} rows to train on; {facts.skipped_rows:,} unusable rows were skipped"
    images = f", {facts.other_images_rows:,} left out for their number of images" if facts.other_images_rows else ""
    return "\n".join([*lines, f"- {counts}{images}, {facts.long_rows:,} left out as too long"])


def _method(model: TrainedModel) -> str:
    described = get_method(model.method).text.replace("\n\n", "\0").replace("\n", " ").replace("\0", "\n\n")
    # These texts are ours: their mark-up is meant.
    parts = [f"`{model.method}`, with TRL's loss `{model.loss_type}`. {described}"]
    papers = list(dict.fromkeys(_ARXIV.findall(described)))
    if model.citation is not None:
        parts.append(_fenced(model.citation, "bibtex"))
    elif papers:
        parts.append("Cite " + ", ".join(f"[arXiv:{one}](https://arxiv.org/abs/{one})" for one in papers) + ".")
    parts += ["It builds on GRPO:", _fenced(GRPO_CITATION, "bibtex")]
    return "\n\n".join(parts)


def _recipe(model: TrainedModel, facts: RunFacts | None) -> str:
    options = facts.recipe if facts else model.changed_options
    shown = {
        name: value if name in ("system_prompt", "prompt_suffix") else portable(value)
        for name, value in options.items()
        if name not in _MACHINE_OPTIONS and not _SECRET.search(name)
    }
    intro = (
        "`cppo train --config` reads this as a file" if facts else "Fields of `CPPOConfig` that are not the defaults"
    )
    return f"{intro}:\n\n{_fenced(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip(), 'yaml')}"


def base_name(source: str) -> str:
    """The model that training started from, in words: `micro`, a name on the hub, or the name of a folder."""
    if Path(source) == MICRO_DIR:
        return "micro"
    return Path(source).name if Path(source).exists() else portable(source)


def changed_options(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from their defaults, if YAML can hold them."""
    changed = {}
    for one in fields(config):
        value = getattr(config, one.name)
        if value != plain_default(one) and isinstance(value, (bool, int, float, str, list)):
            changed[one.name] = str(value.value) if hasattr(value, "value") else value
    return changed


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _interval(ends: Sequence[float]) -> str:
    return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _plain(text: str) -> str:
    """Text in Markdown: no mark-up, no HTML, one line."""
    return re.sub(r"([^\w\s])", r"\\\1", " ".join(text.split()), flags=re.ASCII)


def _code(text: str) -> str:
    """Text as one code span."""
    fence = "`" * (_longest_run(text) + 1)
    inner = " ".join(text.split())
    return f"{fence} {inner} {fence}" if len(fence) > 1 else f"`{inner}`"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
