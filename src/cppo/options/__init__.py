"""Training options and their rules: CPPO's own, a run's, and inherited ones from TRL. Imports no torch."""

from cppo.options.batches import Batch, check_group_sizes, check_rows
from cppo.options.method import EXECUTION_OPTIONS, CPPOOptions, check_combinations, cppo_fields, without_method
from cppo.options.run import ADAPTER_OPTIONS, RATED_OPTIONS, RunOptions, TrainOptions
from cppo.options.schedules import follow_schedules, with_schedules
from cppo.options.schema import Schema, schema
from cppo.options.selection import check_gate_reward

__all__ = [
    "ADAPTER_OPTIONS",
    "EXECUTION_OPTIONS",
    "RATED_OPTIONS",
    "Batch",
    "CPPOOptions",
    "RunOptions",
    "Schema",
    "TrainOptions",
    "check_combinations",
    "check_gate_reward",
    "check_group_sizes",
    "check_rows",
    "cppo_fields",
    "follow_schedules",
    "schema",
    "with_schedules",
    "without_method",
]
