"""All stages in miniature: real handwritten digits in place of the web."""
