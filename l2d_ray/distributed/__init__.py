"""All that knows Ray: thin shells that spread the rest of the package over a cluster."""
