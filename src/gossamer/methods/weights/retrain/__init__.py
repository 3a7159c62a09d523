"""Training under fixed masks, and averaging what several such trainings gave."""
