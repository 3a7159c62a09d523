"""Image tokens that share few neurons with the prompt's core are taken out of the prompt."""
