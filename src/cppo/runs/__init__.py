"""Runs: what `cppo train` and `cppo sft` do around a trainer. Data, loggers, progress, probes, accuracies."""

import cppo.training  # noqa: F401  the version of TRL is checked before anything else
