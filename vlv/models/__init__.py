"""Models as a whole: loading, assembling from pretrained parts, converting, exporting, counting and rebuilding."""
