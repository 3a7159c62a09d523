"""Claims of the control family: one module per method, ``CLAIMS`` in each."""
