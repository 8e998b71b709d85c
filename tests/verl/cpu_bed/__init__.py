"""What verl needs to run on a machine without a GPU: a platform, a rollout backend, and a way for weights to travel."""
