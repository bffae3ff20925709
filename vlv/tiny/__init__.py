"""The parts of the bundled checkpoint, each with the training stage that makes it: VAE, teacher, encoder, language."""
