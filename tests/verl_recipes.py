"""Recipes as verl's options, in a file for the tests on both sides; `python tests/verl_recipes.py` writes it.

`cppo verl-config` reads TRL's options, and verl's own check of what it prints needs verl: the two are never installed
together. `tests/cli/test_verl_config.py` holds the file against the command, tests/verl hold it against verl.
"""

import json
from pathlib import Path
from typing import Any

ABSENT = "(absent)"
"""Stands in the file for an option that the base has and a case has not."""
FILE = Path(__file__).with_suffix(".json")
BASE = "cppo-3b"
LOSSES = {
    "dapo": "",
    "dapo-delta": "--delta 3",
    "grpo": "--loss_type grpo --epsilon_high 0.28",
    "dr_grpo": "--loss_type dr_grpo --beta 0.04",
    "sapo": "--loss_type sapo --sapo_temperature_neg 1.3",
    "cispo": "--loss_type cispo --epsilon_high 5",
    "sequence": "--loss_type grpo --importance_sampling_level sequence",
    "k3": "--beta 0.04 --use_bias_correction_kl false",
}
"""Losses of TRL by options; KL is left out, and the dual clip, where nothing is said of them."""
OTHERS = {
    BASE: "",
    "warm-up": "--lr_scheduler_type constant_with_warmup --warmup_steps 20 --max_steps 100 --bf16 false",
    "cosine": "--lr_scheduler_type cosine --warmup_steps 0.1 --adam_beta2 0.95 --report_to tensorboard wandb",
    "held-out": "--eval_data tasks:digits --final_eval_samples 100 --save_steps 64 --freeze_vision_tower",
    "separate": "--mode separate_async --nodes 2 --rollout_nodes 3 --steps_per_generation 16 --perception_weight 0.02",
    "vllm": "--config vllm-colocate --perception_temperature 0.2 --top_k 50 --removing_views crop static",
    "lora": "--config lora-24gb --recipe_gpus 1 --gpus_per_node 1 --perception_memory joint",
}


def words(name: str) -> list[str]:
    """The arguments of `cppo verl-config` of a case."""
    if name in LOSSES:
        plain = [] if "delta" in name else ["--delta", "null"]
        return ["--config", BASE, "--beta", "0", *plain, *LOSSES[name].split()]
    given = OTHERS[name].split()
    return given if "--config" in given else ["--config", BASE, *given]


def translated(name: str) -> dict[str, Any]:
    """What `cppo verl-config` makes of a case."""
    from cppo.cli.verl_config import translation

    return dict(translation(words(name)).options)


def stored() -> dict[str, dict[str, Any]]:
    """verl's options of each case, as the file has them."""
    cases = json.loads(FILE.read_text(encoding="utf-8"))
    base = cases[BASE]
    return {
        name: {option: value for option, value in {**base, **changes}.items() if value != ABSENT}
        for name, changes in cases.items()
    }


def written() -> str:
    """The content of the file: the base, and of the other cases what differs from it."""
    cases = {name: translated(name) for name in (BASE, *LOSSES, *OTHERS)}
    base = cases[BASE]
    changes = {
        name: {
            option: options.get(option, ABSENT)
            for option in sorted({*options, *base})
            if options.get(option, ABSENT) != base.get(option, ABSENT)
        }
        for name, options in cases.items()
    }
    return json.dumps({**changes, BASE: base}, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
