"""Train tokenizers for megablip models: `python -m tokenization --help`."""
