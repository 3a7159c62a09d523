"""Attribution: where in the text, and in which head, a latent gets its value from."""
