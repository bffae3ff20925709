"""Measures how good a VLV is."""
