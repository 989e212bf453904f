"""The built-in codecs: one file each, named like the choice (`update=int8` is int8.py)."""
