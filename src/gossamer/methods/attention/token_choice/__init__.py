"""Which tokens of a prompt take part in a layer, and in which layers others may rest."""
