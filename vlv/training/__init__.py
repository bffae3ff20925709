"""Training by recipes: the stages, the trainer, and the code for resuming and for several processes."""
