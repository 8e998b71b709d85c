"""Load models and adapters only if complete, merge adapters, and unwrap models.

A tensor that a checkpoint lacks would be random.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from cppo.errors import UserError, one_line, tell
from cppo.files import reading

SHOWN_KEYS = 3


@contextmanager
def whole_weights() -> Iterator[None]:
    """Context: `from_pretrained` refuses a checkpoint that lacks weights, and warns of unused weights.

    Tied weights may be missing from the file.

    Raises:
        UserError: names the checkpoint, and the missing or misshapen weights if it can be read.
    """
    owner: Any = PreTrainedModel
    original = vars(owner)["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        asked = options.pop("output_loading_info", False)
        with reading(f"model: the weights in {name}"):
            model, report = original.__func__(cls, name, *args, output_loading_info=True, **options)
        _check_report(str(name), report)
        return (model, report) if asked else model

    owner.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        owner.from_pretrained = original


def _check_report(name: str, report: Mapping[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model: the weights in {name} lack {_some(missing)}, which would be random: the files are incomplete, or "
            "for another kind of model"
        )
    misshapen = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"])
    if misshapen:
        raise UserError(f"model: the weights in {name} do not have the shapes of its config.json: {_some(misshapen)}")
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        tell(f"warning: {name} holds weights that the model does not use: {_some(unexpected)}")


def load_weights(model: PreTrainedModel, checkpoint: str) -> bool:
    """Load the weights of a checkpoint from `save_pretrained`; False if the folder holds no such model.

    For some families (Qwen2.5-VL, LLaVA) `save_pretrained` renames weights in the file, and only `from_pretrained`
    renames them back. `Trainer` does not: it skips names that it cannot match, with a warning, and a resumed run
    continues from its initial weights (huggingface/transformers issue 43701).
    """
    if not Path(checkpoint, CONFIG_NAME).is_file():
        return False
    # Not rounded to the first weight's dtype: some weights, such as a float32 head, may have higher precision.
    kinds = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    widest = functools.reduce(torch.promote_types, kinds)
    with whole_weights():
        saved = type(model).from_pretrained(checkpoint, dtype=widest)
    model.load_state_dict(saved.state_dict())
    return True


def with_adapter(model: Any, folder: str) -> PeftModel:
    """The model with the adapter of a folder.

    Raises UserError where its kind is unknown, weights are missing, or it cannot be read.
    """
    if Path(folder).is_dir() and not any(Path(folder).glob("adapter_model.*")):
        raise UserError(f"model: the adapter {folder} has no adapter_model.safetensors: its weights are missing")
    try:
        with reading(f"model: the adapter {folder}"):
            adapted = PeftModel.from_pretrained(model, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model: PEFT does not know this kind of adapter: {folder} ({one_line(error)})") from error
    check_adapter(adapted, folder)
    return adapted


def check_adapter(adapted: Any, folder: str) -> None:
    """Raise UserError where the folder cannot be read or lacks weights of the active adapter."""
    needed = set(get_peft_model_state_dict(adapted))
    with reading(f"model: the adapter {folder}"):
        missing = sorted(needed - set(load_peft_weights(folder, device="cpu")))
    if missing:
        raise UserError(f"model: the adapter {folder} lacks {_some(missing)}: its file is incomplete")


def _some(names: list[str]) -> str:
    """The first few names, and the number of the others."""
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, `torch.compile` and PEFT wrappers."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            wrapper, model = model, extract_model_from_parallel(model, keep_torch_compile=False)
            if model is wrapper:
                raise TypeError(f"{type(model).__name__} is neither a transformers model nor a known wrapper")
    return model


def adapts_tied_weights(model: Any) -> bool:
    """Whether an adapter is on the embedding or the output layer, and both share their weight."""
    model = unwrapped(model)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    plain = [_plain(end) for end in ends]
    shared = plain[1] is not None and plain[0].weight is plain[1].weight
    return shared and any(one is not end for one, end in zip(plain, ends, strict=True))


def merged(model: Any) -> Any:
    """The transformers model of a PEFT model, with the adapter merged.

    An adapter on the weight that embedding and output layer share would change both when merged. So each layer gets its
    own weight, and the configuration then says that they are not tied.
    """
    if adapts_tied_weights(model):
        base = unwrapped(model)
        head = _plain(base.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    return model.merge_and_unload()


def _plain(layer: Any) -> Any:
    """The layer without its adapter."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
