"""The language model: loading it, and running packed prompts through it."""
