"""Training machinery that every recipe shares: the folder of a run, checkpoints, metrics, profiling."""
