"""Fine-tuning with Ray Train and DeepSpeed."""
