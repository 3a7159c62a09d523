"""Linear layers with structure in place of dense ones: Monarch products, iso-FLOP sparse forms."""
