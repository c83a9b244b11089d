"""Towers: each family against transformers' own way of calling it."""

import math

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPVisionConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.clip import CLIPImageProcessor
from transformers.models.siglip import SiglipImageProcessor
from transformers.models.siglip2 import Siglip2ImageProcessor

from megablip.errors import ConfigError
from megablip.model.layout import layout_from_config
from megablip.model.vision import build_tower, encode_tiles, freeze, normalize_pixels, tower_config, tower_features

from .tiny import docs, features_of, gradients, pack, tiny_config, tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def siglip(side=16):
    return SiglipVisionConfig(**SIZES, image_size=side)


def siglip2(side=16):
    return Siglip2VisionConfig(**SIZES, num_patches=16, image_size=side)


def clip(side=16):
    return CLIPVisionConfig(**SIZES, image_size=side)


FAMILIES = [siglip, siglip2, clip]
families = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


def tower_of(config):
    torch.manual_seed(0)
    tower = freeze(build_tower(config))
    for parameter in tower.parameters():  # initial positions and norms would hide mistakes
        parameter.normal_(std=0.2)
    return tower


def images(count=3, side=16):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_transformers(tower, tiles):
    """Pixels by the family's image processor, features by its forward."""
    kind, side = tower.config.model_type, tiles.shape[-1]
    if kind == "siglip2_vision_model":
        patches = (side // 4) ** 2
        inputs = Siglip2ImageProcessor(patch_size=4, max_num_patches=patches)(list(tiles), return_tensors="pt")
        assert inputs["spatial_shapes"].tolist() == [[side // 4, side // 4]] * len(tiles)
        return tower(**inputs).last_hidden_state
    size = {"height": side, "width": side}
    if kind == "siglip_vision_model":
        return tower(**SiglipImageProcessor(size=size)(list(tiles), return_tensors="pt")).last_hidden_state
    inputs = CLIPImageProcessor(size=size, crop_size=size)(list(tiles), return_tensors="pt")
    return tower.post_layernorm(tower(**inputs).last_hidden_state)[:, 1:]


@families
def test_features_are_transformers(make):
    tower, tiles = tower_of(make()), images()
    wanted = by_transformers(tower, tiles)
    found = encode_tiles(tower, tiles)
    layout = tiny_config().layout
    assert found.shape == (3, layout.patches_per_tile, 32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode_tiles(tower, tiles, chunk_tiles=2), wanted, atol=1e-5, rtol=1e-5)
    pixels = normalize_pixels(tiles, tower.config)
    assert torch.equal(encode_tiles(tower, pixels), found)


@families
def test_patches_are_row_by_row(make):
    """A patch's own pixels move its own feature most; its mask stands at the same place."""
    tower = tower_of(make())
    for number in (1, 4, 14):  # near the ends and where rows and columns differ
        row, column = divmod(number, 4)
        changed = images(1)
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
        moved = (encode_tiles(tower, changed) - encode_tiles(tower, images(1))).norm(dim=-1)[0]
        assert int(moved.argmax()) == number


def test_siglip2_at_another_size_than_its_table():
    tower, tiles = tower_of(siglip2(side=24)), images(side=24)
    assert encode_tiles(tower, tiles).shape == (3, 36, 32)
    torch.testing.assert_close(encode_tiles(tower, tiles), by_transformers(tower, tiles), atol=1e-5, rtol=1e-5)
    # What is left beside whole patches is left out, as by a convolution.
    assert torch.equal(encode_tiles(tower, torch.nn.functional.pad(tiles, (0, 3, 0, 3))), encode_tiles(tower, tiles))


@families
def test_pixels_are_normalised_as_the_family_does(make):
    config = tower_config(make())
    other = CLIPImageProcessor() if make is clip else SiglipImageProcessor()
    assert config.image_mean == list(other.image_mean)
    assert config.image_std == list(other.image_std)
    pixels = normalize_pixels(images(), config)
    mean, std = (torch.tensor(x)[:, None, None] for x in (config.image_mean, config.image_std))
    torch.testing.assert_close(pixels, (images() / 255 - mean) / std, atol=1e-6, rtol=1e-6)


@families
def test_a_model_of_each(make, tmp_path):
    """Saved and loaded, with what its pixels are normalised with; trained, with a gradient for each weight."""
    text = tiny_config().text_config
    model = tiny_model(text=text, vision=make())
    model.config.vision_config.image_std = [0.3, 0.4, 0.5]  # of one's own
    packed = pack(docs())
    assert model.config.layout == tiny_config().layout
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.vision_tower.config.image_std == [0.3, 0.4, 0.5]
    assert loaded.config.layout == model.config.layout
    assert torch.equal(features_of(loaded, packed), features_of(model, packed))
    trained = tiny_model(text=text, vision=make(), train_tower=True)
    trained(packed=packed).loss.backward()
    found = gradients(trained)
    assert all(grad.isfinite().all() for grad in found.values())
    # Keys' biases cancel in the softmax; the class token's patches reach the loss, its own feature does not.
    still = {name for name, grad in found.items() if name.startswith("vision_tower") and not grad.abs().max() > 1e-9}
    assert all(name.endswith("k_proj.bias") for name in still)
    with torch.no_grad():
        torch.testing.assert_close(
            trained(packed=packed).loss,
            trained(packed=packed, vision_features=tower_features(trained.vision_tower, packed.tiles)).loss,
        )


@pytest.mark.parametrize("make", [siglip, siglip2])
def test_a_pooling_head_is_kept_but_never_run(make):
    tower = tower_of(make())
    tower.head.register_forward_hook(lambda *_: pytest.fail("the head was run"))
    encode_tiles(tower, images())
    assert "head.probe" in tower.state_dict()


def test_the_tower_of_a_whole_model():
    """`config.json` of a released SigLIP or CLIP describes its text model, too."""
    for whole, part in ((SiglipConfig(), "siglip_vision_model"), (CLIPConfig(), "clip_vision_model")):
        assert tower_config(whole) is whole.vision_config
        assert tiny_config(vision=whole).vision_config.model_type == part


def test_tile_size_without_one_of_its_own():
    config = tower_config(Siglip2VisionConfig())  # google/siglip2-base-patch16-naflex
    assert config.image_size == math.isqrt(256) * 16
    layout = layout_from_config(
        {"vision_config": vars(config), "visual_tokens": {"per_tile": 8, "per_image": 0}, "grids": []}
    )
    assert (layout.tile_size, layout.patches_per_tile) == (256, 256)


def test_other_towers_are_refused():
    with pytest.raises(ConfigError, match="family vit is not supported"):
        build_tower(ViTConfig())
