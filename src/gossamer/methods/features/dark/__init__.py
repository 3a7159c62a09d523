"""Dark matter: what a dictionary misses, and how much of that a linear map could have told."""
