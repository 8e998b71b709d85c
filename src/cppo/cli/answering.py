"""The model of `cppo eval` and its answers, loaded once when needed, in all processes of a launcher."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cppo.assets import adapter_base, resolve_model
from cppo.cli.eval_report import category_text
from cppo.cli.parser import COUNT, number_in
from cppo.data import RecordSource
from cppo.data.spec import PathSpec, parse_spec
from cppo.errors import UserError
from cppo.files import content_fingerprint, model_fingerprint
from cppo.progress import Progress
from cppo.runs.checks import check_packages, launched_processes

if TYPE_CHECKING:
    from cppo.evaluation import Condition, EvalResult
    from cppo.evaluation.response_file import ResponseFile

ASKED = ("samples", "temperature", "top_p", "max_new_tokens", "seed", "system_prompt", "tolerance")
"""The settings that `evaluate` takes."""
BATCH_SIZES = {"transformers": 64, "vllm": 1024}
"""Default number of responses at once. vLLM itself chooses how many of its batch run together."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add --batch_size, --use_vllm and vLLM's options, under TRL's names."""
    small, large = BATCH_SIZES.values()
    parser.add_argument(
        "--batch_size", type=COUNT, metavar="N", help=f"responses at once (default: {small}; with --use_vllm {large})"
    )
    parser.add_argument("--use_vllm", action="store_true", help="generate through vLLM, which is installed separately")
    parser.add_argument(
        "--vllm_tensor_parallel_size", type=COUNT, metavar="N", help="GPUs that share the weights (default: 1)"
    )
    parser.add_argument(
        "--vllm_gpu_memory_utilization",
        type=number_in("(0, 1]"),
        metavar="X",
        help="fraction of a GPU's memory for vLLM (default: 0.9)",
    )
    parser.add_argument(
        "--vllm_max_model_length",
        type=COUNT,
        metavar="N",
        help="tokens of prompt and response together (default: the model's limit)",
    )


def check_engine(arguments: Any) -> None:
    """Check that the options of `add_engine_options` go with the others, and that vLLM is there. Raises UserError."""
    if not arguments.use_vllm:
        for name, value in vars(arguments).items():
            if name.startswith("vllm_") and value is not None:
                raise UserError(f"--{name} needs --use_vllm")
        return
    check_packages({"use_vllm": True})
    if arguments.device is not None:
        raise UserError("--device: vLLM uses the GPUs in CUDA_VISIBLE_DEVICES; leave it out with --use_vllm")
    if adapter_base(arguments.model) is not None:
        raise UserError(
            f"--use_vllm: {arguments.model} is an adapter: `cppo export --model {arguments.model} --out DIR` makes a "
            "model of it"
        )


def source_identity(arguments: Any) -> dict[str, Any]:
    """Which model and which data: with the settings, what must be equal for results in one file."""
    specs = [(text, parse_spec(text)) for text in arguments.data]
    return {
        **model_identities(arguments.model),
        "data": [content_fingerprint(spec.path) if isinstance(spec, PathSpec) else text for text, spec in specs],
    }


def model_identities(model: str) -> dict[str, str]:
    """Identities of a model, and of an adapter's base model."""
    base = adapter_base(model)
    return {"model": _model_identity(model), **({} if base is None else {"adapter's model": _model_identity(base)})}


def _model_identity(name: str) -> str:
    folder = Path(resolve_model(name))
    return model_fingerprint(folder) if folder.is_dir() else name


class Answering:
    """The model of a command, and the processes that answer together.

    Attributes:
        processes: those of the launcher, else this one.
        identity: what generates, for the head of a response file: dtype, and the engine if it is vLLM.
        batch_size: responses at once.
    """

    def __init__(self, arguments: Any) -> None:
        """Join the other processes. Raises UserError if there is not a device for each."""
        from cppo.evaluation import join_processes, placement

        device, self._dtype = placement(arguments.device, arguments.dtype)
        # Under vLLM the GPUs belong to engines in their own processes.
        device = "cpu" if arguments.use_vllm else device
        self.processes, self._device = join_processes(device, launched_processes())
        self.identity = {"dtype": self._dtype, **({"engine": "vllm"} if arguments.use_vllm else {})}
        self._arguments = arguments
        self.batch_size = arguments.batch_size or BATCH_SIZES["vllm" if arguments.use_vllm else "transformers"]

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """The first two arguments of `evaluate` and `rate_records`."""
        from cppo.evaluation import load_model

        given = self._arguments
        if not given.use_vllm:
            return load_model(given.model, device=self._device, dtype=self._dtype)
        from cppo.evaluation.vllm_engine import load_vllm

        options = {
            "tensor_parallel_size": given.vllm_tensor_parallel_size,
            "gpu_memory_utilization": given.vllm_gpu_memory_utilization,
            "max_model_length": given.vllm_max_model_length,
        }
        stated = {name: value for name, value in options.items() if value is not None}
        return load_vllm(given.model, dtype=self._dtype, **stated), None

    def answer(
        self,
        source: RecordSource,
        conditions: "Sequence[Condition]",
        settings: Mapping[str, Any],
        responses: str | None,
        identity: Mapping[str, Any],
        right: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
    ) -> "dict[str, EvalResult]":
        """Answer the records under each condition, by its name; answers in the response file are reused.

        Every process gets the results; only the first reads and writes the file and shows the progress.

        Args:
            settings: those in ASKED go to `evaluate`.
            responses: the response file, or None.
            identity: what must be equal for responses in that file.
            right: as in `evaluate`.
        """
        from cppo.evaluation.response_file import ResponseFile

        stored = ResponseFile(responses, identity) if responses and self.processes.is_first else None
        known = {one.name: stored.known(one.name, source) if stored else () for one in conditions}
        known = self.processes.from_first(known)
        found = {}
        for number, one in enumerate(conditions, 1):
            label = one.name if len(conditions) == 1 else f"{one.name} ({number} of {len(conditions)})"
            found[one.name] = self._answer(label, source, one, settings, known[one.name], stored, right)
        return found

    def _answer(
        self,
        label: str,
        source: RecordSource,
        condition: "Condition",
        settings: Mapping[str, Any],
        known: Sequence[Any],
        stored: "ResponseFile | None",
        right: Callable[[str, Sequence[str]], Sequence[float]] | None,
    ) -> "EvalResult":
        from cppo.evaluation import check_marks, evaluate

        model, processor = self.model if len(known) < len(source) else (None, None)
        if processor is not None:
            texts = {name: settings[name] for name in ("system_prompt", "prompt_suffix")}
            check_marks(processor, [source], **texts)
        name, indices = condition.name, iter(range(len(known), len(source)))

        def keep(record: Any, item: Any) -> None:
            if stored:
                stored.append(name, record, item, categories(source, next(indices)))

        with Progress(total=len(source), initial=len(known), desc=label, unit="items") as bar:
            return evaluate(
                model,
                processor,
                source,
                condition=condition,
                batch_size=self.batch_size,
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
