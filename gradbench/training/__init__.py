"""The training of one run: batches, phases, evaluation."""
