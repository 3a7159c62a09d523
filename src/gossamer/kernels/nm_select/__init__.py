"""N:M selection: ``keep`` of every ``of`` consecutive scores."""
