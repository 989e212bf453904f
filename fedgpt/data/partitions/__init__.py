"""The built-in partitions: one file each, named like the choice (`partition=iid` is iid.py)."""
