import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as HFTokenizer

from megablip.errors import ConfigError
from megablip.tokens import CHAT_TOKENS, VISION_TOKENS, Tokenizer

CONTROL = ["<unk>", "<s>", "</s>", "<|user|>", "<pad>", *VISION_TOKENS]
CHAT = [token for token in CHAT_TOKENS.values() if token != "<|user|>"]


def write_tokenizer(folder, control=CONTROL, **names):
    """A tokenizer in Phi-3's manner: byte fallback, a space put first, no OCR tags."""
    vocab = {token: i for i, token in enumerate([*control[:3], *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a"])}
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    is_chat = set(CHAT_TOKENS.values()).__contains__  # white space after these is theirs
    tokenizer.add_special_tokens([AddedToken(token, rstrip=is_chat(token), normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **names}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("phi"), bos_token={"content": "<s>"}))


def test_ids(tokenizer):
    first = 3 + 256 + 3
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.pad_id == first + 1  # after <|user|>
    assert tokenizer.image_id == first + 2
    assert tokenizer.end_of_chunk_id == first + 4
    assert tokenizer.vocab_size == first + 5


def test_bos_may_be_missing(tmp_path):
    assert Tokenizer(write_tokenizer(tmp_path)).bos_id is None
    assert Tokenizer(write_tokenizer(tmp_path, bos_token=None)).bos_id is None


@settings(deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, "<0x41>", "a", " ", "<ocr>", "<", "|>", "\n", "é"])).map("".join))
def test_no_text_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id, tokenizer.end_of_chunk_id}
    assert not control & set(ids)
    assert max(ids, default=0) < tokenizer.image_id - 2
    assert tokenizer.decode(ids) == text


def test_templates_may_name_control_tokens_and_texts_may_not(tokenizer):
    user = tokenizer.encode_template("<|user|>")
    assert len(user) == 1
    assert set(user) <= tokenizer.control_ids
    assert not tokenizer.control_ids & set(tokenizer.encode("<|user|>"))
    assert tokenizer.has("<|user|>")
    assert not tokenizer.has("a")
    assert not tokenizer.has("<|end|>")


@pytest.mark.parametrize("forged", ["<image>", "<pad>"])
def test_a_control_token_that_text_can_spell_is_refused(tmp_path, forged):
    path = write_tokenizer(tmp_path, control=CONTROL + CHAT) / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != forged
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="would become the control token"):
        Tokenizer(tmp_path)


def test_a_pickled_tokenizer_is_as_strict(tokenizer):
    text = "<image></s>"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_decode_drops_control_tokens_and_keeps_tags(tokenizer):
    ids = [tokenizer.bos_id, tokenizer.image_id, *tokenizer.encode("<ocr>a</ocr>"), tokenizer.end_of_chunk_id]
    assert tokenizer.decode(ids) == "<ocr>a</ocr>"


def test_a_missing_token_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no <\|endofchunk\|>"):
        Tokenizer(write_tokenizer(tmp_path, control=CONTROL[:-1]))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no eos_token"):
        Tokenizer(tmp_path)


def test_an_unreadable_folder(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        Tokenizer(tmp_path / "nowhere")
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match="can't be read"):
        Tokenizer(tmp_path)
