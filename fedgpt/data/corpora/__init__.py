"""The built-in corpora: one file each, named like the choice (`corpus=stdlib` is stdlib.py)."""
