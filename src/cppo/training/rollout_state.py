"""What a checkpoint must hold, beyond TRL's, so that a resumed run repeats the uninterrupted one exactly."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from cppo.errors import UserError


@dataclass(frozen=True)
class RolloutState:
    """The trainer's place in the data.

    Attributes:
        micro_step: micro-batches done, TRL's `_step`, which it restarts at 0.
        epoch: passes over the data begun before the current one.
        buffered_inputs: rollouts and views that are still to be trained on, one dictionary a micro-batch, or None
            where the next micro-batch generates anew.
    """

    micro_step: int
    epoch: int
    buffered_inputs: list[dict[str, Any]] | None

    def save(self, checkpoint: str, process_index: int) -> None:
        """Write to the checkpoint folder, one file a process; complete or not there at all."""
        path = _path(checkpoint, process_index)
        os.makedirs(checkpoint, exist_ok=True)
        torch.save(vars(self), path + ".part")
        os.replace(path + ".part", path)

    @classmethod
    def load(cls, checkpoint: str, process_index: int, device: torch.device) -> "RolloutState":
        """Read what `save` wrote, rollouts on `device`, views on the CPU.

        Raises:
            UserError: the file is not there or not readable.
        """
        path = _path(checkpoint, process_index)
        try:
            state = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: this checkpoint was not written by CPPOTrainer with as many processes as now; "
                "start anew from its weights with model=CHECKPOINT instead of resuming"
            ) from None
        except Exception as error:
            raise UserError(f"{path} cannot be read ({error}): resume from an earlier checkpoint") from error
        if state.buffered_inputs is None:
            return state
        buffered = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            for batch in state.buffered_inputs
        ]
        return cls(state.micro_step, state.epoch, buffered)


def load_weights(model: PreTrainedModel, checkpoint: str) -> bool:
    """Load the weights of a checkpoint that `save_pretrained` wrote; False if the folder holds no such model.

    `save_pretrained` gives the weights of some families (Qwen2.5-VL, LLaVA) other names in the file than in the model,
    and only `from_pretrained` translates them back. `Trainer` does not: it skips what it cannot match, with a warning,
    and a resumed run goes on from the weights it was started with (huggingface/transformers issue 43701).
    """
    if not os.path.isfile(os.path.join(checkpoint, CONFIG_NAME)):
        return False
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def _path(checkpoint: str, process_index: int) -> str:
    return os.path.join(checkpoint, f"rollout_state_{process_index}.pt")
