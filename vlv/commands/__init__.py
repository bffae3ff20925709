"""The commands of `vlv`, one module each; `vlv.cli` lists them."""
