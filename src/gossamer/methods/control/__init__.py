"""Control: steer what a model does by editing its activations, reversibly."""
