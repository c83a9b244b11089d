import json

import pytest
import webdataset
from rich.progress import Progress
from typer.testing import CliRunner

from megablip.config import SourceConfig
from megablip.data.encode import Encoder
from megablip.data.images import image_size
from megablip.data.schemas import SCHEMAS
from megablip.records import Image, Text, VisualLayout
from tokenization.train import train_tokenizer
from tools import demo_shards
from tools.demo_shards import CANVASES, FORMATS, KINDS, app, make_demo_shards
from tools.digits import load_digits


@pytest.fixture(scope="module")
def few_copies():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_shards, "AUGMENTED_COPIES", 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, few_copies):
    out = tmp_path_factory.mktemp("demo") / "data"
    make_demo_shards(out, documents=400, seed=0, progress=Progress(disable=True))
    return out


def samples(folder, split, kind):
    """(key, members) of every sample, undecoded."""
    urls = sorted(map(str, (folder / split).glob(f"{kind}-*.tar")))
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        yield sample["__key__"], members


def document_of(kind, members, key):
    (document,) = SCHEMAS[kind](members, SourceConfig(name=kind, shards="", schema=kind, weight=1), key)
    return document


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_sample_is_a_document_that_says_the_truth(folder, split, kind):
    found = list(samples(folder, split, kind))
    assert len(found) == max(1, round((400 if split == "train" else 8) * KINDS[kind]))
    for key, members in found:
        truth = json.loads(members["json"])["digits"]
        segments = document_of(kind, members, key).segments
        texts = [segment.text for segment in segments if isinstance(segment, Text)]
        assert all(image_size(segment.data) in CANVASES for segment in segments if isinstance(segment, Image))
        if kind == "ocr":
            assert texts[0].startswith(f"<ocr>{truth}</ocr>")
        elif kind == "caption":
            assert texts[0] in [write(truth) for write in FORMATS]
        elif kind == "interleaved":
            assert 3 <= len(truth) == len(texts) <= 9
            assert any(texts == [write(digits) for digits in truth] for write in FORMATS)
        else:
            assert texts[0].count(" = ") == 1


def test_splits_share_no_source_digit(folder):
    used = {}
    for split in ("train", "validation", "test"):
        kinds = ["ocr"] if split == "test" else KINDS
        found = [json.loads(m["json"])["source_ids"] for kind in kinds for _, m in samples(folder, split, kind)]
        used[split] = {number for ids in found for number in ids}
    digits = load_digits()
    assert all(used[split] <= set(digits[split].ids.tolist()) for split in used)
    labels = {
        split: dict(zip(digits[split].ids.tolist(), digits[split].labels.tolist(), strict=True)) for split in used
    }
    for _, members in samples(folder, "test", "ocr"):
        truth = json.loads(members["json"])
        assert truth["digits"] == "".join(str(labels["test"][number]) for number in truth["source_ids"])


def test_the_test_set(folder):
    found = [(image_size(m["jpg"]), len(json.loads(m["json"])["digits"])) for _, m in samples(folder, "test", "ocr")]
    assert found.count(((96, 48), 3)) >= 600
    assert max(count for _, count in found) == 9
    assert len(found) == len({key for key, _ in samples(folder, "test", "ocr")})


def test_corpus_and_documents_agree(folder):
    lines = (folder / "corpus.txt").read_text().splitlines()
    documents = [
        segment.text
        for kind in KINDS
        for key, members in samples(folder, "train", kind)
        for segment in document_of(kind, members, key).segments
        if isinstance(segment, Text)
    ]
    assert lines == documents


def test_a_digit_is_a_token_and_ocr_documents_are_short(folder, tmp_path):
    train_tokenizer([folder / "corpus.txt"], tmp_path, vocab_size=400)
    encoder = Encoder(str(tmp_path), VisualLayout(48, 8, 10, ((2, 1), (1, 2), (3, 1))))
    assert len(encoder.tokenizer.encode("3810")) == 4
    lengths = []
    for key, members in samples(folder, "train", "ocr"):
        lengths.append(len(encoder.encode(document_of("ocr", members, key)).input_ids))
    assert 36 <= sorted(lengths)[len(lengths) // 2] <= 50
    assert max(lengths) <= 90


def test_the_command_makes_the_same_bytes_from_the_same_seed(folder, tmp_path, few_copies):
    done = CliRunner().invoke(app, ["--documents", "400", "--seed", "0", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "shards" in done.stdout
    shards = sorted(folder.rglob("*.tar"))
    assert [shard.relative_to(folder) for shard in shards] == [
        shard.relative_to(tmp_path / "out") for shard in sorted((tmp_path / "out").rglob("*.tar"))
    ]
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "out" / shard.relative_to(folder)).read_bytes()


def test_the_command_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "precious").touch()
    refused = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert refused.exit_code == 1
    assert "not ours to replace" in refused.stderr
