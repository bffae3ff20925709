"""Taking a trained VLV to the Hub: the model repo, its proof, its card, the Space, and the push."""
