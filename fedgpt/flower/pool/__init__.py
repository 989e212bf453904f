"""The default runtime: persistent worker processes on this machine, with tensors in shared
memory.
"""
