"""Mean-field Gaussian posteriors over a changing few of a network's weights."""
