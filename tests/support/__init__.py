"""Code that several test files share: small worlds, tiny models, running endpoints."""
