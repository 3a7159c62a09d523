"""Training with dense weights behind an N:M mask."""
