"""One module a stage, without Ray."""
