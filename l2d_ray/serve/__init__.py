"""The HTTP application, without Ray."""
