"""Families of GPTs in Hugging Face folders, one file each; hf_formats.py lists them."""
