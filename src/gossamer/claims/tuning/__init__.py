"""Claims of sparse fine-tuning."""
