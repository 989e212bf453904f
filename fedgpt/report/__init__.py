"""The output of a run: progress, figures, samples, summary."""
