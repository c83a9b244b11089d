"""Exports that bring the model's code load where megablip is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_imports

from megablip.convert.folders import copy_companions
from megablip.convert.remote_code import REQUIRED, standalone, write_remote_code
from megablip.errors import CheckpointError
from tests.small_export import make_export

PROMPT, SIZE = "<image>one two<|endofchunk|>three", (30, 17)

# In a process of its own, where neither megablip nor what only some machines have can be imported.
SCRIPT = f"""
import sys
ABSENT = ["megablip", "simplejpeg", "flash_attn", "peft", "pydantic", "deepspeed"]
sys.modules |= dict.fromkeys(ABSENT)
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
options = dict(trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, **options)
model = AutoModelForImageTextToText.from_pretrained(folder, **options)
assert type(AutoModel.from_pretrained(folder, **options)) is type(model)
image = Image.effect_mandelbrot({SIZE}, (-2, -1.5, 1, 1.5), 60)
inputs = processor(text=[{PROMPT!r}], images=[image])
with torch.no_grad():
    logits = model(**inputs).logits
made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
assert not [name for name in sys.modules if name.split(".")[0] == "megablip" and sys.modules[name]]
torch.save(dict(logits=logits, made=made, ids=inputs["input_ids"], tiles=inputs["tiles"]), out)
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    start, output = make_export(folder), folder / "out"
    output.mkdir()
    copy_companions(start, output, torch.float32, remote_code=True)
    shutil.copy(start / "model.safetensors", output)
    return output


def test_it_computes_the_same_without_megablip(tmp_path, export):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(export), str(tmp_path / "result")],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result", weights_only=True)
    model, processor = (auto.from_pretrained(export) for auto in (AutoModelForImageTextToText, AutoProcessor))
    inputs = processor(text=[PROMPT], images=[Image.effect_mandelbrot(SIZE, (-2, -1.5, 1, 1.5), 60)])
    assert torch.equal(result["ids"], inputs["input_ids"])
    assert torch.equal(result["tiles"], inputs["tiles"])
    with torch.no_grad():
        assert torch.equal(result["logits"], model(**inputs).logits)
    assert torch.equal(result["made"], model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_with_megablip_its_own_code_is_used(export):
    assert type(AutoModelForImageTextToText.from_pretrained(export)).__module__ == "megablip.model.blip3"
    assert type(AutoProcessor.from_pretrained(export)).__module__ == "megablip.model.processor"


def test_no_file_names_megablip_or_demands_what_only_some_have(export):
    files = sorted(export.glob("*.py"))
    assert "megablip_model_blip3.py" in {path.name for path in files}
    for path in files:
        found = get_imports(path)
        assert "megablip" not in found, path
        assert set(found) <= REQUIRED | sys.stdlib_module_names, path


def test_another_export_does_not_promise_code_that_it_lacks(tmp_path, export):
    copy_companions(export, tmp_path, torch.bfloat16)
    for name in ("config.json", "processor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / name).read_text())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list(tmp_path.glob("*.py"))


def test_only_what_it_needs_is_written(tmp_path):
    write_remote_code(tmp_path)
    assert not [
        path.name for path in tmp_path.iterdir() if path.name.startswith(("megablip_engine", "megablip_config"))
    ]


SOURCE = """
from typing import TYPE_CHECKING

from megablip.errors import (
    ConfigError,
    PackingError,
)
from megablip.model import packing as p

if TYPE_CHECKING:
    from megablip.config import (
        ModelConfig,
    )

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


def f():
    import math
    from exotic import (
        a,
        b,
    )
    from megablip.records import Skip
    return a


AutoModel.register(
    ConfigError,
    f,
)
ATTENTION.register("x", f)
"""


def test_the_rewriting():
    text, imported = standalone(SOURCE)
    assert imported == ["megablip.errors", "megablip.model.packing", "megablip.records"]
    assert text.lstrip() == textwrap.dedent("""\
        from typing import TYPE_CHECKING

        from .megablip_errors import (
            ConfigError,
            PackingError,
        )
        from . import megablip_model_packing as p

        if TYPE_CHECKING:
            pass

        try:
            import simplejpeg
        except ImportError:
            simplejpeg = None


        def f():
            import math
            try:
                from exotic import (
                    a,
                    b,
                )
            finally:
                pass
            from .megablip_records import Skip
            return a


        pass
        ATTENTION.register("x", f)
        """)


@pytest.mark.parametrize("line", ["import megablip.errors", "from megablip.model import packing, loss"])
def test_imports_that_transformers_would_not_follow_are_refused(line):
    with pytest.raises(CheckpointError, match="line 1 imports"):
        standalone(line)
