"""Fine-tuning of few parameters beside frozen weights."""
