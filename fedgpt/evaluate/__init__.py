"""The central evaluation stage: held-out loss, perplexity, bits per byte."""
