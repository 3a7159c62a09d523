"""What the methods for decoding share: budgets, scores of pages and tokens, reuse across layers."""
