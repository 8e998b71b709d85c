"""verl's trainers with CPPO's worker, one per mode of verl, and the task that runs one."""

from typing import Any, ClassVar

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import (
    PPOTrainer,
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)

from cppo.verl.options import WHERE
from cppo.verl.worker import CPPOActorRolloutRefWorker

PREFIX = "cppo_"
"""Prefix of our trainers in verl's registry, beside verl's own."""
ACTOR_ROLES = (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef)
OF_ACTOR = "actor/"
"""Prefix of the metrics that verl's actor returns."""


class CPPODetachActorWorker(CPPOActorRolloutRefWorker, DetachActorWorker):
    """The worker for rollouts on separate devices."""


class _CPPOTrainer(PPOTrainer):
    """CPPO's changes to a trainer of verl: the actor's worker, and the names of the perception metrics."""

    mode: ClassVar[str]
    worker: ClassVar[type] = CPPOActorRolloutRefWorker

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):  # verl compares it with its own names, e.g. to choose the replay buffer
            config.trainer.v1.trainer_mode = self.mode
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in ACTOR_ROLES:
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.worker)
        # The views of a prompt change each epoch.
        OmegaConf.update(self.config, f"{WHERE}_steps_per_epoch", self.steps_per_epoch, force_add=True)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)
        for name in [name for name in metrics if name.startswith(f"{OF_ACTOR}perception/")]:
            metrics[name.removeprefix(OF_ACTOR)] = metrics.pop(name)
        return batch


@register_trainer(f"{PREFIX}sync")
class CPPOSync(_CPPOTrainer, PPOTrainerSync):
    """Rollouts and updates take turns on the same devices."""

    mode = "sync"


@register_trainer(f"{PREFIX}colocate_async")
class CPPOColocateAsync(_CPPOTrainer, PPOTrainerColocateAsync):
    """Rollouts and updates take turns on the same devices; an unfinished rollout continues after the update."""

    mode = "colocate_async"


@register_trainer(f"{PREFIX}separate_async")
class CPPOSeparateAsync(_CPPOTrainer, PPOTrainerSeparateAsync):
    """Rollouts are made on separate devices while the policy is updated."""

    mode = "separate_async"
    worker = CPPODetachActorWorker


class CPPOTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):
    """verl's task with our trainer of the requested mode. Its process imports this module, which registers them."""

    def run(self, config: DictConfig) -> None:
        """Train until the end."""
        with open_dict(config):
            config.trainer.v1.trainer_mode = PREFIX + config.trainer.v1.trainer_mode
        super().run(config)
