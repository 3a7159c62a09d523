"""Write the model card from the record of the run, so that its numbers cannot drift."""


def render(record: dict) -> str:
    """Format a training record as the model folder's README."""
    return str(record["parameters"])
