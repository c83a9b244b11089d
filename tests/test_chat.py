import json
from pathlib import Path

import pytest
import tokenizers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megablip.chat import chat_format, end_ids
from megablip.data.encode import Encoder
from megablip.errors import ConfigError
from megablip.records import IGNORE_LABEL, Document, Image, Text
from megablip.tokens import CHAT_TOKENS, PHI3_TEMPLATE, Tokenizer
from tests.data.small import LAYOUT, PHI3_TEMPLATES, image, write_phi3_tokenizer, write_tokenizer

# In transformers' own style, each with the tag that marks what the assistant says.
CHATML = (
    "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\n' }}\n"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\n"
    "{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{- '\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}\n"
    "{%- if message.role == 'assistant' %}{% generation %}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}\n"
    "{%- else %}{{ message.content | trim + '<|eot_id|>' }}{% endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOKENS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": list(CHAT_TOKENS.values()),
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "phi3": PHI3}


def make(folder, template=None, tokens=()):
    folder = write_tokenizer(folder, chat=False)
    path = str(folder / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(path)
    if template:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), TEMPLATES[request.param], TOKENS[request.param])


@pytest.fixture(scope="module")
def both(folder):
    return Encoder(str(folder), LAYOUT), AutoTokenizer.from_pretrained(folder)


def turns(*contents):
    return [Text(text, loss=n % 2 == 1, role=("user", "assistant")[n % 2]) for n, text in enumerate(contents)]


def masks(encoder, hugging_face, segments):
    """Ids and trained places by our encoder, and by transformers from the template's own tag."""
    encoded = encoder.encode(Document(tuple(segments), "s", "k"))
    messages = [{"role": segment.role, "content": segment.text} for segment in segments]
    rendered = hugging_face.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = [int(label != IGNORE_LABEL) for label in encoded.labels]
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    if ids[:1] != [encoder.tokenizer.bos_id]:  # a template without bos; documents have one
        ids, mask = [encoder.tokenizer.bos_id, *ids], [0, *mask]
    return (encoded.input_ids.tolist(), ours), (ids, mask)


def test_ids_and_mask_equal_transformers(both):
    for segments in (
        turns("a dog", "the cat"),
        turns("a", "b 3", "the dog 381", "4", "x", "y"),
        [Text("be good", False, "system"), *turns("a dog", "")],
    ):
        ours, theirs = masks(*both, segments)
        assert ours == theirs


GOLDEN = yaml.safe_load((Path(__file__).parent / "fixtures" / "chats.yaml").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_and_mask_are_those_written_by_hand(name, tmp_path):
    encoder = Encoder(str(write_tokenizer(tmp_path)), LAYOUT)
    case = GOLDEN[name]
    segments = [Text(case["system"], False, "system")] if "system" in case else []
    for number, words in enumerate(case["turns"]):
        role = ("user", "assistant")[number % 2]
        before, *after = words.split("IMG")
        segments.append(Text(before, role == "assistant", role))
        for text in after:
            segments += [image(), Text(text, False, role)] if text else [image()]
    encoded = encoder.encode(Document(tuple(segments), "s", "k"))
    expected = []
    for word in case["tokens"].split():
        token, _, times = word.partition("*")
        expected += [token] * int(times or 1)
    found = []
    for number, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True):
        token = encoder.tokenizer.spell([number]).replace(" ", "_").replace("\n", "\\n")
        assert label in (number, IGNORE_LABEL)
        found.append(token if label == IGNORE_LABEL else f"[{token}]")
    assert found == expected


# Words that do not run into a template's line ends: there a tokenizer may join what we tokenize apart.
WORDS = st.text(st.sampled_from("ab 3é<|>"), max_size=12).map(lambda text: "x" + text.strip() + "x")


@settings(deadline=None, max_examples=150)
@given(contents=st.lists(WORDS, min_size=2, max_size=14).filter(lambda words: len(words) % 2 == 0))
def test_any_chat_equals_transformers(both, contents):
    ours, theirs = masks(*both, turns(*contents))
    assert ours == theirs


@pytest.mark.slow
@settings(deadline=None, max_examples=10_000)
@given(contents=st.lists(WORDS, min_size=2, max_size=14).filter(lambda words: len(words) % 2 == 0))
def test_ten_thousand_chats_equal_transformers(both, contents):
    """A minute and a half for each of three formats, on an idle machine."""
    ours, theirs = masks(*both, turns(*contents))
    assert ours == theirs


def test_images_in_any_turn_are_never_trained(both):
    encoder = both[0]
    picture = image()
    segments = [
        *turns("a", "b"),
        Text("", False, "user"),
        picture,
        Text("c", False, "user"),
        Text("d", True, "assistant"),
    ]
    encoded = encoder.encode(Document(tuple(segments), "s", "k"))
    slots = encoded.input_ids == encoder.tokenizer.image_id
    assert slots.sum() == encoded.tiles * LAYOUT.tokens_per_tile
    assert set(encoded.labels[slots].tolist()) == {IGNORE_LABEL}
    plain = encoder.encode(Document(tuple(s for s in segments if not isinstance(s, Image)), "s", "k"))
    assert encoded.input_ids[~slots].tolist() == plain.input_ids.tolist()
    assert encoded.labels[~slots].tolist() == plain.labels.tolist()


@pytest.mark.parametrize("byte_level", [False, True])
@pytest.mark.parametrize("form", PHI3_TEMPLATES)
def test_phi3s_own_templates_give_transformers_ids(form, byte_level, tmp_path):
    folder = write_phi3_tokenizer(tmp_path, PHI3_TEMPLATES[form], byte_level)
    encoder, hugging_face = Encoder(str(folder), LAYOUT), AutoTokenizer.from_pretrained(folder)
    tokenizer, chat = encoder.tokenizer, encoder.require_chat()
    system = [Text("be good", False, "system")] if form == "new" else []
    assert ("system" in chat.opening) == bool(system)
    segments = [*system, *turns("a dog", "the cat", "a 3", "4")]

    def theirs(segments, **options):
        messages = [{"role": segment.role, "content": segment.text} for segment in segments]
        ids = hugging_face.apply_chat_template(messages, **options)["input_ids"]
        return ids if form == "old" else [tokenizer.bos_id, *ids]  # documents have a bos

    encoded = encoder.encode(Document(tuple(segments), "s", "k")).input_ids.tolist()
    assert encoded + [tokenizer.eos_id] * (form == "new") == theirs(segments)
    asked = encoder.encode_prompt(Document(tuple(segments[:-1]), "s", "k")).input_ids.tolist()
    assert asked == theirs(segments[:-1], add_generation_prompt=True)
    assert encoded[: len(asked)] == asked
    assert tokenizer.names(encoded[len(asked) :])[-1] == "<|end|>"  # the line's end is part of it
    assert tokenizer.names(chat.answer_end_ids) == ["<|end|>"]
    assert end_ids(tokenizer, folder) == [tokenizer.eos_id, *chat.answer_end_ids]
    begin, end = chat.user_turn(tokenizer)
    assert tokenizer.names([*begin, end]) == ["<|user|>", "<|end|>"]


def test_a_tokenizer_that_gives_other_ids_turn_by_turn_is_refused(tmp_path):
    """Each text alone gets a space at its head, the same text after a line's end none."""
    (tmp_path / "phi3").mkdir()
    folder = write_phi3_tokenizer(tmp_path / "phi3", PHI3_TEMPLATES["new"], rstrip=False)
    with pytest.raises(ConfigError, match=r"'<0x0A>', '▁', .* not .*'<0x0A>', '<0x71>'") as caught:
        chat_format(Tokenizer(folder), folder)
    assert "prepend_scheme" in caught.value.remedy
    for scheme in ("first", "always"):
        (tmp_path / scheme).mkdir()
        folder = make(tmp_path / scheme, CHATML, TOKENS["chatml"])
        path = str(folder / "tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(path)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
        tokenizer.save(path)
        with pytest.raises(ConfigError, match="other ids for a conversation turn by turn"):
            chat_format(Tokenizer(folder), folder)


def test_a_token_that_the_tokenizer_lacks_is_no_text(tmp_path):
    """As Qwen's bos, which is null in its config."""
    folder = make(tmp_path, "{{ bos_token }}" + CHATML, TOKENS["chatml"])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": None}))
    assert chat_format(Tokenizer(folder), folder).preamble == ()


def test_an_answer_that_no_control_token_ends(tmp_path):
    folder = make(tmp_path, CHATML.replace("+ '<|im_end|>' }}{% endgeneration", "}}{% endgeneration"), TOKENS["chatml"])
    tokenizer = Tokenizer(folder)
    found = chat_format(tokenizer, folder)
    assert found.closing["assistant"] == tuple(tokenizer.encode("\n"))
    assert found.answer_end_ids == ()
    assert end_ids(tokenizer, folder) == [tokenizer.eos_id]


def test_phi3s_tokens_without_a_template_give_phi3s_format(tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    named = make(tmp_path / "with", PHI3_TEMPLATE, TOKENS["phi3"])
    bare = make(tmp_path / "without", None, TOKENS["phi3"])
    found = chat_format(Tokenizer(bare), bare)
    assert found == chat_format(Tokenizer(named), named)
    tokenizer = Tokenizer(bare)
    assert found.opening["user"] == tuple(tokenizer.encode_template("<|user|>\n"))
    assert found.closing["assistant"][: found.end_of_turn] == tuple(tokenizer.encode_template("<|end|>"))


def test_no_template_and_no_tokens_are_no_format(tmp_path):
    folder = make(tmp_path)
    assert chat_format(Tokenizer(folder), folder) is None


def test_a_template_of_its_own_file_comes_first(tmp_path):
    folder = make(tmp_path, CHATML, TOKENS["chatml"])
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ConfigError, match="shows 1 of them"):
        chat_format(Tokenizer(folder), folder)


# As Qwen3 does: what it thought is left out of all answers but the last.
THINKS = CHATML.replace(
    "{% generation %}{{ message",
    "{% generation %}{% if loop.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}{{- message",
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "it is no template"),
        ("{{ messages[9].content }}", "can't be rendered|shows 0 of them"),
        ("{{ raise_exception('no') }}", "can't be rendered: no"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can't be rendered"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}", "forge a turn"),
        (CHATML.replace("{{- '\n' }}", "{{- '\n' if not loop.last }}"), "first user's turn opens in another way"),
        (CHATML + "{% if not add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}", "ends in another way at the end"),
        (THINKS, "the last answer opens with .*<think>"),
        (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"), "add_generation_prompt writes"),
        (CHATML.partition("{%- if add_generation_prompt")[0], "add_generation_prompt writes"),
    ],
)
def test_templates_that_are_no_format_are_refused(tmp_path, template, words):
    folder = make(tmp_path, template, TOKENS["chatml"])
    tokenizer = Tokenizer(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        chat_format(tokenizer, folder)
    assert "chat_template.jinja" in caught.value.remedy


def test_what_ends_an_answer(tmp_path):
    for name, template, last in (("phi3", None, "<|end|>"), ("chatml", CHATML, "<|im_end|>")):
        (tmp_path / name).mkdir()
        folder = make(tmp_path / name, template, TOKENS[name])
        tokenizer = Tokenizer(folder)
        assert [tokenizer.spell([number]) for number in end_ids(tokenizer, folder)] == ["</s>", last]
    folder = make(tmp_path)
    tokenizer = Tokenizer(folder)
    assert end_ids(tokenizer, folder) == [tokenizer.eos_id]


def test_what_a_users_turn_is_known_by(folder):
    """Its opening without the line's end, and the control token after its content."""
    tokenizer = Tokenizer(folder)
    begin, end = chat_format(tokenizer, folder).user_turn(tokenizer)
    spelled = {
        "chatml": ("<|im_start|>user", "<|im_end|>"),
        "llama3": ("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
        "phi3": ("<|user|>", "<|end|>"),
    }
    wanted = next(value for name, value in spelled.items() if tokenizer.has(TOKENS[name][0]))
    assert (tokenizer.spell(begin).replace(" ", ""), tokenizer.spell([end])) == wanted
