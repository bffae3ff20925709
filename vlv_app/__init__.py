"""The pages and the API of `spaces_app.py`. A Space gets this folder too, so nothing here imports `vlv`."""
