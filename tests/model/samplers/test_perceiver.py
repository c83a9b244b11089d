import torch

from megablip.model.samplers import PerceiverResampler, regroup_released

TINY = {"dim": 24, "output_dim": 16, "depth": 2, "heads": 3, "dim_head": 8, "num_latents": 5, "ff_mult": 4}


def test_full_size_has_the_released_parameters():
    with torch.device("meta"):
        sampler = PerceiverResampler(
            dim=1152, output_dim=3072, depth=6, heads=16, dim_head=96, num_latents=128, ff_mult=4
        )
    assert sum(parameter.numel() for parameter in sampler.parameters()) == 109_901_568
    shapes = {name: tuple(parameter.shape) for name, parameter in sampler.named_parameters()}
    assert len(shapes) == 71
    assert shapes["latents"] == (128, 1152)
    assert shapes["layers.5.0.to_kv.weight"] == (3072, 1152)
    assert shapes["layers.0.1.3.weight"] == (1152, 4608)
    assert shapes["projection.bias"] == (3072,)


def test_padded_patches_are_not_seen():
    torch.manual_seed(0)
    sampler = PerceiverResampler(**TINY)
    features = torch.randn(3, 9, 24)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False  # nothing but padding: latents still see each other
    before = sampler(features, mask)
    assert before.shape == (3, 5, 16)
    assert before.isfinite().all()
    changed = features.clone()
    changed[~mask] = 100.0
    torch.testing.assert_close(sampler(changed, mask), before)
    changed[1, 0] = 100.0
    assert not torch.allclose(sampler(changed, mask)[1], before[1])
    torch.testing.assert_close(sampler(features[1:2, :4], mask[1:2, :4]), before[1:2], atol=1e-6, rtol=1e-5)


def test_released_regrouping_gives_full_width_strips():
    side = 3
    # Each patch carries (image, row, column) of its place in the stitched map.
    tiles, places = [], []
    for image, (columns, rows) in enumerate([(2, 2), (1, 2), (3, 1)]):
        tiles.append(torch.full((9, 3), -1.0))  # the base tile
        for row in range(rows):
            for column in range(columns):
                y, x = torch.meshgrid(
                    torch.arange(side) + row * side, torch.arange(side) + column * side, indexing="ij"
                )
                tiles.append(torch.stack([torch.full_like(y, image), y, x], -1).reshape(9, 3).float())
        stitched = [(image, y, x) for y in range(rows * side) for x in range(columns * side)]
        places.append([None, *(stitched[start : start + 9] for start in range(0, len(stitched), 9))])
    tiles.append(torch.full((9, 3), -2.0))  # one tile of no image
    features = torch.stack(tiles)
    mask = features[..., 2] % 2 == 0
    regrouped, regrouped_mask = regroup_released(features, mask, [(2, 2), (1, 2), (3, 1)])
    wanted = [group for image in places for group in image]
    for tile, group in zip(regrouped, wanted, strict=False):
        if group is None:
            assert (tile == -1).all()
        else:
            assert [tuple(patch) for patch in tile.int().tolist()] == group
    assert (regrouped[-1] == -2).all()
    assert torch.equal(regrouped_mask, regrouped[..., 2] % 2 == 0)
