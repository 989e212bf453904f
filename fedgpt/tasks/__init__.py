"""Kinds of learning problems, one file each: what is a batch, its loss, a score and a sample."""
