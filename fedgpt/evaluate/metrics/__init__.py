"""More numbers of each central evaluation, one file each: the names that `metrics=` takes."""
