"""Text to tokens to shards: corpora, tokenizers, the prepared token array, partitioners,
batches.
"""
