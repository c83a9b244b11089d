"""Train a SentencePiece BPE model and write it as a Hugging Face tokenizer folder.

The ids, in order: `<unk> <s> </s> <pad>`, markup tags, 256 bytes, learned
pieces, Phi-3's chat tokens where they are asked for, and last the three tokens
that xGen-MM adds.  Digits stand alone, bytes
spell what no piece covers, and nothing is normalised, so text comes back as it
was (except U+2581, which SentencePiece uses for the space).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from megablip.errors import ConfigError
from megablip.tokens import CHAT_TOKENS, OCR_TAGS, PAD_TOKEN, PHI3_TEMPLATE, VISION_TOKENS

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "\u2581"
BYTES = 256

# SentencePiece leaves out longer lines; a web document is often one line.
MAX_LINE_BYTES = 2**20


def train_tokenizer(
    inputs: Sequence[Path], out: Path, vocab_size: int, tags: Sequence[str] = OCR_TAGS, chat: bool = False
) -> int:
    """Train on the lines of `inputs` and fill the folder `out`.

    Args:
        vocab_size: ids in all; a corpus too small to fill them gives fewer.
        tags: markup that is one token wherever it stands in text.
        chat: add the tokens and the template of Phi-3's conversations.

    Returns:
        The number of ids.

    Raises:
        ConfigError: no such input, an empty one, or too few ids.
    """
    missing = [str(path) for path in inputs if not path.is_file()]
    if missing:
        raise ConfigError("the corpus does not exist", where=", ".join(missing), remedy="check the path")
    added = [*(CHAT_TOKENS.values() if chat else ()), *VISION_TOKENS]
    needed = len((UNK, BOS, EOS, PAD_TOKEN)) + len(tags) + BYTES + len(added)
    if vocab_size <= needed:
        raise ConfigError(
            f"{vocab_size} ids leave no room for words: bytes and special tokens take {needed}",
            where="vocab-size",
            remedy=f"ask for more than {needed}",
        )
    out.mkdir(parents=True, exist_ok=True)
    model = _train_sentencepiece(inputs, out, vocab_size - len(added), tags)
    tokenizer = to_hugging_face(model, tags, added)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD_TOKEN,
        "additional_special_tokens": added,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        config["chat_template"] = PHI3_TEMPLATE
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def to_hugging_face(
    model: sentencepiece.SentencePieceProcessor, tags: Sequence[str], added: Sequence[str] = VISION_TOKENS
) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library, with `added` control tokens after its pieces."""
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(model, vocab, tags), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    # No piece has a space but at its start, so words can be cut there (and cached).
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([UNK, BOS, EOS, PAD_TOKEN])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def _train_sentencepiece(
    inputs: Sequence[Path], out: Path, vocab_size: int, tags: Sequence[str]
) -> sentencepiece.SentencePieceProcessor:
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(path) for path in inputs],
            model_prefix=str(out / "tokenizer"),
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD_TOKEN,
            user_defined_symbols=list(tags),
            max_sentence_length=MAX_LINE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"SentencePiece could not train: {error}", where=", ".join(map(str, inputs)), remedy="check the corpus"
        ) from None
    (out / "tokenizer.vocab").unlink(missing_ok=True)  # a listing of what tokenizer.model holds
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def _merges(
    model: sentencepiece.SentencePieceProcessor, vocab: dict[str, int], tags: Sequence[str]
) -> list[tuple[str, str]]:
    """BPE's merges in order of rank: SentencePiece keeps pieces and scores only.

    Every split of a learned piece into two pieces is a merge, ranked by the
    score of the result; splits of one piece by their parts, so that the result
    doesn't depend on chance.
    """
    learned = {
        piece: i
        for piece, i in vocab.items()
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i) or piece in tags)
    }
    ranked = []
    for piece, i in learned.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in learned and right in learned:
                ranked.append((-model.get_score(i), learned[left], learned[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
