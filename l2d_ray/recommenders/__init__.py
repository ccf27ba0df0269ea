"""Recommenders, one module each, with one interface."""
