"""What several test files share: small worlds, tiny models, running endpoints."""
