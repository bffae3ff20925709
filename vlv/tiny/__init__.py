"""The parts of the bundled checkpoint, and the training stage of each: VAE, teacher, encoder, language."""
