"""How good a VLV is, by numbers that a command reprints."""
