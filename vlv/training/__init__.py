"""Training by recipes: the stages, the trainer around them, and what makes a run resumable and shared by processes."""
