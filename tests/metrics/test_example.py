import torch

from megablip.data.collate import collate
from megablip.metrics.example import colour_example
from tests.model.tiny import make_doc, pack, tiny_config


class Names:
    def spell(self, ids):
        return "".join(f"<{number}>" for number in ids)


def styles(text):
    return {text.plain[span.start : span.end]: span.style for span in text.spans}


def test_each_token_has_the_colour_of_what_becomes_of_it():
    doc = make_doc(4, [(2, 1)], seed=0)
    doc.labels = torch.where(doc.input_ids == 90, -100, doc.input_ids)
    doc.labels[0] = -100
    text = colour_example(pack([doc, make_doc(5, [], 1)]), ["web"], Names())
    assert text.plain.startswith("web 0: 13 tokens, 3 trained, 1 masked, 9 visual\n")
    found = styles(text)
    assert found["[9 visual tokens]"] == "blue"
    assert found[f"<{int(doc.input_ids[0])}>"] == "dim"
    trained = [name for name, style in found.items() if style == "bold green"]
    assert "".join(trained).count("<") == 3


def test_a_dummy_shows_nothing():
    assert colour_example(collate([], tiny_config().layout), ["web"], Names()) is None
