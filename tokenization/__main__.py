"""Command line of the tokenizer tools.

python -m tokenization train --input corpus.txt --vocab-size 512 --out tokenizer/
"""

from pathlib import Path
from typing import Annotated

import typer

from megablip.errors import MegablipError
from megablip.tokens import OCR_TAGS
from tokenization.train import train_tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Tokenizers for megablip models."""


@app.command()
def train(
    input: Annotated[list[Path], typer.Option(help="Text files, UTF-8, a document or paragraph a line.")],
    vocab_size: Annotated[int, typer.Option(help="Ids in all, special tokens included; small corpora give fewer.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    token: Annotated[list[str], typer.Option(help="Markup kept as one token. [default: OCR tags]")] = list(OCR_TAGS),  # noqa: B006
    chat: Annotated[bool, typer.Option(help="Add the tokens and the template of Phi-3's conversations.")] = False,
) -> None:
    """Train a SentencePiece BPE model and write it as a Hugging Face tokenizer."""
    try:
        ids = train_tokenizer(input, out, vocab_size, tuple(token), chat)
    except MegablipError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{out}: {ids} ids")


if __name__ == "__main__":
    app(prog_name="python -m tokenization")
