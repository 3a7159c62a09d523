"""What the methods that train share: a loop, hidden activations to watch, undo."""
