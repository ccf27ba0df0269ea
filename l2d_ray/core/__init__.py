"""The mathematics, as pure functions of numpy and torch arrays: no files, no engine."""
