"""A denoising autoencoder trained with few connections, for choosing features."""
