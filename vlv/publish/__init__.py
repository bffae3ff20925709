"""Publishes a trained VLV on the Hub: builds the model repo, its card and the Space, checks them, and pushes them."""
