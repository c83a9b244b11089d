"""A model of the release's full layout with random weights, written and converted in bounded memory.

    python -m tests.convert.large make FOLDER DECODER_LAYERS
    python -m tests.convert.large there-and-back FOLDER

Prints a line of JSON: seconds, bytes, and the peak of anonymous memory in the process.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch

from megablip.checkpoint.export import ExportReader
from megablip.checkpoint.tensors import TensorSource
from megablip.checkpoint.writer import ShardWriter
from megablip.checkpoint.xgenmm import PREFIX, model_shapes, released_config, released_layout
from megablip.convert.sources import stretches
from megablip.convert.xgenmm import hf_to_xgenmm, xgenmm_to_hf
from megablip.model.blip3 import Blip3Config


class Memory:
    """The peak of RssAnon of this process while it is open, sampled every 5 ms."""

    def __enter__(self) -> Memory:
        self.before, self.peak, self._open = anonymous_bytes(), 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.005)


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


def config_of(layers: int) -> Blip3Config:
    config = released_config()
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def make(folder: Path, layers: int) -> None:
    """The released layout, fp32; values differ from place to place."""
    folder.mkdir()
    config = config_of(layers)
    config.save_pretrained(folder / "config")
    layout = released_layout(model_shapes(config), first_added=config.image_token_id)
    shapes = {PREFIX + tensor.name: tensor.shape for tensor in layout}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20 + 4099, generator=generator)
    (folder / "released").mkdir()
    with ShardWriter(folder / "released", shapes, torch.float32) as writer:
        for number, name in enumerate(writer.order):
            for start, end in stretches(shapes[name]):
                offset = (number * 613 + start // 2**20 * 7) % 4099
                writer.write(name, start, noise[offset : offset + end - start])


def there_and_back(folder: Path) -> dict[str, float]:
    released = folder / "released"
    size = sum(path.stat().st_size for path in released.iterdir())
    found: dict[str, float] = {"bytes": size, "tensors": len(ExportReader(released).shapes)}
    with Memory() as memory:
        began = time.monotonic()
        xgenmm_to_hf(released, folder / "hf", config=folder / "config")
        found["to_hf_s"] = round(time.monotonic() - began, 1)
        began = time.monotonic()
        hf_to_xgenmm(folder / "hf", folder / "back")
        found["back_s"] = round(time.monotonic() - began, 1)
    found["peak_anonymous_bytes"], found["anonymous_bytes_before"] = memory.peak, memory.before
    found["different"] = _different(ExportReader(released), ExportReader(folder / "back"), config_of(1).image_token_id)
    return found


def _different(one: TensorSource, other: TensorSource, first_added: int) -> int:
    """Tensors that are not bit for bit the same, dead rows left out."""
    shapes, count = one.shapes, 0
    assert shapes == other.shapes
    tables = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    for name, shape in shapes.items():
        dead_from = (first_added, *shape[1:]) if name.endswith(tables) else shape
        pairs = ([source.elements(name, *ends) for source in (one, other)] for ends in stretches(dead_from))
        count += not all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
    return count


if __name__ == "__main__":
    verb, path, *rest = sys.argv[1:]
    if verb == "make":
        make(Path(path), int(rest[0]))
    else:
        print(json.dumps(there_and_back(Path(path))))
