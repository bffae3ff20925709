"""Collections of images whose captions are written, edited and saved in the app."""
