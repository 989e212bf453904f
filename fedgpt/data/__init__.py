"""Text becomes tokens, and tokens become the clients' shards.

corpus corpora/ documents, each with its owner prepare prepare.py documents split into public, held
out and the clients'; one token array partition partitions/ the clients' part of the array divided
into shards batches batches.py a shard's tokens as windows that a model is trained on
"""
