"""Language models: loading, fast layers, packed inference and the training loss."""
