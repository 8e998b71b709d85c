"""`python -m cppo.verl [--config FILE.yaml] [any option of verl]`: verl's program with CPPO."""

import shlex
import sys
from collections.abc import Sequence

from cppo.errors import UserError, tell_mistake
from cppo.verl.command import read_options
from cppo.verl.versions import check_versions

USAGE = """usage: python -m cppo.verl [--config FILE.yaml] [NAME=VALUE ...]

Trains with verl and CPPO's perception term. Options are verl's, as NAME=VALUE, or in a file, one NAME: VALUE a line;
those of the command line win. CPPO's own stand below actor_rollout_ref.rollout.custom.cppo, for example
actor_rollout_ref.rollout.custom.cppo.method=cppo.

`cppo verl-config --config cppo-3b` writes a recipe's options in either form, `cppo verl-data SPEC --out FILE.parquet`
writes data in verl's layout. docs/scale/verl.md explains the rest."""

PYTHON = "ray_kwargs.ray_init.runtime_env.py_executable"
"""verl's option for the interpreter of Ray's workers. Ray passes it to a shell, and quotes none of its own choice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train. Returns the exit status: 0, or 2 after a user's mistake."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    try:
        check_versions()
        _run(_overrides(words))
    except UserError as error:
        tell_mistake(error)
        return 2
    return 0


def _overrides(words: list[str]) -> list[str]:
    """The options in order of precedence, those of a file first. Raises UserError."""
    file: list[str] = []
    if words[0] == "--config":
        if len(words) < 2:
            raise UserError("--config: give a file, such as one from `cppo verl-config --out FILE.yaml`")
        file, words = read_options(words[1]), words[2:]
    wrong = next((word for word in words if word.startswith("-")), None)
    if wrong is not None:
        raise UserError(f"{wrong}: write options of verl as NAME=VALUE, after `--config FILE.yaml`")
    return [*file, *words]


def _run(words: list[str]) -> None:
    import ray
    from omegaconf import OmegaConf
    from ray.exceptions import RayTaskError
    from verl.trainer.main_ppo import run_ppo
    from verl.utils.device import auto_set_device

    from cppo.verl.checks import check_config, check_files
    from cppo.verl.composed import check_choices, composed
    from cppo.verl.trainer import CPPOTaskRunner

    config = composed(words)
    check_config(config)
    auto_set_device(config)
    check_choices(config)
    check_files(config)
    if shlex.quote(sys.executable) != sys.executable and OmegaConf.select(config, PYTHON) is None:
        OmegaConf.update(config, PYTHON, shlex.quote(sys.executable), force_add=True)
    try:
        run_ppo(config, ray.remote(CPPOTaskRunner))
    except RayTaskError as error:
        raise user_mistake(error) or error from None
    finally:
        ray.shutdown()


def user_mistake(error: BaseException) -> UserError | None:
    """The user's mistake that made an actor of Ray fail, directly or through another actor; None for other failures."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return UserError(str(error)) if isinstance(error, UserError) else None


if __name__ == "__main__":
    sys.exit(main())
