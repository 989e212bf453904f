"""The runtimes, one class in each file; fedgpt/core/runtimes.py has their interface and names."""
