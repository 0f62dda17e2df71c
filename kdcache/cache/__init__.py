"""The cache: a plain Zarr v3 group with commit records. Needs numpy, numcodecs and zarr only."""
