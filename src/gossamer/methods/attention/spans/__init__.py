"""Windows whose length differs by head and grows with the text: planning, storing, running."""
