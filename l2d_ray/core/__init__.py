"""The papers on arrays: numpy and torch, no files, no engine."""
