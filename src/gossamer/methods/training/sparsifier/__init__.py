"""What keeps a network sparse while it trains."""
