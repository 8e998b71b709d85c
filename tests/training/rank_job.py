"""The trainings of the two-process test: `rank_job.py MODEL FOLDER ROWS_A_PROCESS CASES`, alone or under torchrun.

One process trains every case in turn: starting it takes longer than a training.
"""

import json
import sys

import torch
from rollout_stubs import build_trainer, inject, make_rows


def main() -> None:
    model, folder, rows_a_process, cases = sys.argv[1:]
    torch.set_num_threads(1)
    results = {}
    for name, options in json.loads(cases).items():
        trainer = build_trainer(
            model,
            folder,
            make_rows([1, 0, 2, 1]),
            per_device_train_batch_size=int(rows_a_process),
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            lr_scheduler_type="constant",
            perception_weight=0.5,
            log_perception_grad_share=True,
            **options,
        )
        inject(trainer, same_each_time=True).train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        weights = {weight: value.detach() for weight, value in trainer.model.named_parameters()}
        results[name] = {"weights": weights, "logs": logs}
    if trainer.is_world_process_zero():
        torch.save(results, f"{folder}/results.pt")
    # A process that ends while another still uses the group can make that one fail.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
