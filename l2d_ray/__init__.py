"""Recommend with a large language model without generating a token (L2D, arXiv 2509.11524), on Ray.

The rooms, from the inside out: `core` is the paper on arrays; `data`, `prompts`, `models` and `memory` read, phrase,
run and store; `distributed` spreads them over a cluster. The stages themselves are the scripts in `jobs/`.
"""

__version__ = "0.1.0"
