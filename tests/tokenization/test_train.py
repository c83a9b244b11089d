import random
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megablip.chat import chat_format
from megablip.errors import ConfigError
from megablip.tokens import CHAT_TOKENS, OCR_TAGS, PAD_TOKEN, VISION_TOKENS, Tokenizer
from tokenization.train import train_tokenizer

WORDS = [
    "three",
    "there",
    "eight",
    "eighteen",
    "the",
    "reads",
    "digits:",
    "über",
    "<ocr>",
    "</ocr>",
    "381",
    "7",
    "日本",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(500)), encoding="utf-8")
    train_tokenizer([corpus], folder, vocab_size=340)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


texts = st.text(alphabet="there igh381\n\t<>ocr/日é😀 ", max_size=40) | st.lists(st.sampled_from(WORDS)).map(" ".join)


@settings(max_examples=400, deadline=None)
@given(texts)
def test_encodes_as_sentencepiece_does(tokenizer, model, text):
    assert tokenizer.encode(text) == model.encode(text)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("there")) < len("there")


def test_order_of_ids(tokenizer, folder):
    hf = AutoTokenizer.from_pretrained(folder)
    assert hf.convert_ids_to_tokens(range(8)) == ["<unk>", "<s>", "</s>", PAD_TOKEN, *OCR_TAGS]
    assert hf.convert_ids_to_tokens(range(len(hf) - 3, len(hf))) == list(VISION_TOKENS)
    assert tokenizer.vocab_size == len(hf) <= 340


def test_auto_tokenizer_agrees(tokenizer, folder):
    hf = AutoTokenizer.from_pretrained(folder)
    text = " reads <ocr>381</ocr>\n über"
    assert hf(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert hf.decode(tokenizer.encode(text)) == text
    roles = (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id)
    assert roles == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    # There, unlike in megablip, the strings of special tokens are those tokens.
    assert hf.convert_tokens_to_ids("<image>") == hf("<image>", add_special_tokens=False).input_ids[0]


def test_small_corpus_gives_fewer_ids(tmp_path):
    (tmp_path / "corpus.txt").write_text("a dog\n")
    assert train_tokenizer([tmp_path / "corpus.txt"], tmp_path / "out", vocab_size=5000) < 300


def test_tokens_and_template_of_conversations(tmp_path):
    (tmp_path / "corpus.txt").write_text("a b c\n" * 10)
    train_tokenizer([tmp_path / "corpus.txt"], tmp_path, vocab_size=300, chat=True)
    tokenizer = Tokenizer(tmp_path)
    ids = [tokenizer.encode_template(token) for token in (*CHAT_TOKENS.values(), *VISION_TOKENS)]
    assert ids == [[number] for number in range(tokenizer.vocab_size - len(ids), tokenizer.vocab_size)]
    found = chat_format(tokenizer, tmp_path)
    assert set(found.opening) == {"system", "user", "assistant"}
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert text == "<|user|>\na<|end|>\n"


def test_own_tags(tmp_path):
    (tmp_path / "corpus.txt").write_text("a <box> b\n")
    train_tokenizer([tmp_path / "corpus.txt"], tmp_path / "out", vocab_size=280, tags=["<box>"])
    tokenizer = Tokenizer(tmp_path / "out")
    assert len(tokenizer.encode("<box>")) == 1
    assert len(tokenizer.encode("<ocr>")) > 1


@pytest.mark.parametrize(("content", "vocab_size"), [(None, 300), ("", 300), ("a dog\n", 100)])
def test_bad_input_is_a_config_error(tmp_path, content, vocab_size):
    if content is not None:
        (tmp_path / "corpus.txt").write_text(content)
    with pytest.raises(ConfigError):
        train_tokenizer([tmp_path / "corpus.txt"], tmp_path / "out", vocab_size)


def test_command_line(tmp_path):
    (tmp_path / "corpus.txt").write_text("a dog\na cat\n")
    command = [sys.executable, "-m", "tokenization", "train", "--vocab-size", "300", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--input", str(tmp_path / "corpus.txt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ids" in done.stdout
    assert len(Tokenizer(tmp_path / "out").encode("<ocr>")) == 1
    failed = subprocess.run([*command, "--input", str(tmp_path / "nowhere.txt")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "does not exist" in failed.stderr
    assert "Traceback" not in failed.stderr
