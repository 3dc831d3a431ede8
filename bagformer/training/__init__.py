"""Training on pairs of texts and pictures: configuration, data, optimiser, loop, checkpoints, log."""
