"""A frozen network made to do another task: a probe behind it, or a prompt before it."""
