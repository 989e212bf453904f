"""Additional numbers of each central evaluation, one file each; `metrics=` takes their names."""
