"""The method at inference time, one room a file; all but this one travel in every checkpoint."""
