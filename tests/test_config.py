"""Recipes: what is read, what is refused, and with which words."""

from __future__ import annotations

import copy
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megablip.config import Config, Duration, dump_config, identity_changes, load_config, parse_config, weights_at
from megablip.errors import ConfigError
from tests.minimal import RECIPE


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def refusal(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def changed(**changes) -> Config:
    """RECIPE with dotted keys, __ for dots, set to other values."""
    raw = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        node = raw
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(raw, "test")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
        ("optimizer.clipnorm=1", "did you mean 'clip_norm'?"),
        ("engine.rank=2", "unknown key 'engine.rank'; did you mean 'ranks'?"),
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("data.sources.0.shema=text", "unknown key 'data.sources.0.shema'; did you mean 'schema'?"),
        ("batch.zzz=1", "known: lanes, micro_batch_sequences, sequences_per_lane"),
    ],
)
def test_an_unknown_key_names_the_nearest(recipe, override, words):
    assert words in refusal(recipe, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.lanes=many", "batch.lanes"),
        ("batch.lanes=0", "batch.lanes"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("data.sources.1.weight=.inf", "data.sources.1.weight"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1"),
        ("optimizer.eps=0", "optimizer.eps"),
        ("data=5", "data"),
        ("data.sources=[]", "data.sources"),
        ("data.sources.0.schema=parquet", "caption"),
        ("data.sources.0.name=b", "distinct names"),
        ("checkpoint.keep=1", "checkpoint.keep"),
        ("stage=stf", "pretrain"),
        ("engine=null", "engine"),
        ("duration=soon", "'soon' is no duration; write for example '2000 steps'"),
        ("duration=1.2.3 steps", "'1.2.3 steps' is no duration"),
        ("duration={value: -1, unit: steps}", "duration.value"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(recipe, override, words):
    message = refusal(recipe, override)
    assert words in message
    assert str(recipe) in message


def test_a_missing_field_is_named(recipe):
    raw = copy.deepcopy(RECIPE)
    del raw["batch"]["lanes"]
    recipe.write_text(yaml.safe_dump(raw))
    assert "batch.lanes: Field required" in refusal(recipe)


def test_more_ranks_than_lanes_is_refused(recipe):
    assert "engine.ranks (5) is larger than batch.lanes (4)" in refusal(recipe, "engine.ranks=5")
    assert load_config(recipe, ["engine.ranks=4"]).engine.ranks == 4


def test_a_missing_recipe_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.yaml")
    assert str(tmp_path / "no.yaml") in refusal(tmp_path / "no.yaml")
    assert "can't be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a mapping"),
        (b"- a\n- b\n", "not a mapping"),
        (b"a: [1, 2\nb: {", "can't be read"),
        (b"a: b: c", "can't be read"),
        (b"\xff\xfe\x00binary\x80", "can't be read"),
        (b"seed: 2001-99-99", "can't be read"),  # YAML reads a date here
        (b"seed: " + b"9" * 5000, "can't be read"),
        (b"[" * 1000, "can't be read"),
        (b"1: 2", "1"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert words in refusal(path)


def test_yaml_never_executes_code(recipe, tmp_path):
    trace = tmp_path / "executed"
    attack = f"!!python/object/apply:os.mkdir ['{trace}']"
    assert "python/object" in refusal(recipe, f"seed={attack}")
    recipe.write_text(f"seed: {attack}\n")
    assert "python/object" in refusal(recipe)
    assert not trace.exists()


def test_overrides(recipe):
    config = load_config(
        recipe,
        [
            "optimizer.lr=1e-3",  # YAML 1.1 reads a string
            "data.sources.1.weight=2E+1",
            "data.sources.0.shards=[x.tar, 'y=z.tar']",
            "engine.ds_config=my=file.json",
            "model.path=1e3",
            "engine.ranks=2",  # a section that the recipe lacks
            "stop_after_steps=null",
            "duration=1.5M tokens",
        ],
    )
    assert config.optimizer.lr == 1e-3
    assert config.data.sources[1].weight == 20.0
    assert config.data.sources[0].shards == ["x.tar", "y=z.tar"]
    assert config.engine.ds_config == "my=file.json"
    assert config.model.path == "1e3"
    assert config.engine.ranks == 2
    assert config.stop_after_steps is None
    assert config.duration == Duration(value=1_500_000, unit="tokens")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "'seed' is no override"),
        ("=1", "'=1' is no override"),
        ("seed=[1", "the value of seed is no YAML"),
        ("seed=2001-99-99", "the value of seed is no YAML"),
        ("stage.deep=1", "stage is a value, not a section"),
        ("data.sources.2.weight=1", "'2' is no index of a list of 2"),
        ("data.sources.first.weight=1", "'first' is no index of a list of 2"),
        ("data.sources.².weight=1", "'²' is no index"),
        ("data.sources.-1=1", "'-1' is no index"),
    ],
)
def test_a_wrong_override_is_refused(recipe, override, words):
    assert words in refusal(recipe, override)


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_no_override_ends_in_anything_but_a_config_error(tmp_path_factory, key, value):
    recipe = tmp_path_factory.getbasetemp() / "any.yaml"
    if not recipe.exists():
        recipe.write_text(yaml.safe_dump(RECIPE))
    for override in (f"{key}={value}", f"duration={value}", f"data.sources.{key}=1", key):
        try:
            load_config(recipe, [override])
        except ConfigError:
            continue


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2000 steps", 2000, "steps"),
        ("1_000 steps", 1000, "steps"),
        ("3 k steps", 3000, "steps"),
        ("2.5M tokens", 2_500_000, "tokens"),
        ("100B tokens", 10**11, "tokens"),
        ("1.1T  tokens", 1_100_000_000_000, "tokens"),
        ("1 epoch", 1, "epochs"),
        ("3 epochs", 3, "epochs"),
    ],
)
def test_durations(text, value, unit):
    duration = Duration.model_validate(text)
    assert (duration.value, duration.unit) == (value, unit)


@given(st.integers(0, 10**15), st.sampled_from(["steps", "tokens", "epochs"]))
def test_a_duration_reads_back_what_it_prints(value, unit):
    duration = Duration(value=value, unit=unit)
    assert Duration.model_validate(str(duration)) == duration


@pytest.mark.parametrize(
    "text", ["", "10", "steps", "10 lightyears", "-1 steps", "1e3 steps", "._ steps", "9" * 400 + " steps"]
)
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="is no duration"):
        changed(duration=text)


HELD = {"name": "held", "shards": "held-*.tar", "schema": "caption", "weight": 1}


def test_share_done_counts_the_unit_of_the_duration():
    assert Duration.model_validate("10 steps").done(steps=5, tokens=1000) == 0.5
    assert Duration.model_validate("1k tokens").done(steps=5, tokens=2000) == 2.0
    assert Duration.model_validate("2 epochs").done(steps=5, tokens=2000, epochs=0.5) == 0.25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"duration": "1.5 epochs"}, "whole epochs"),
        ({"optimizer__warmup": "1 epoch"}, "warmup is counted in steps or tokens"),
        ({"optimizer__schedule": "wsd"}, "give both or neither"),
        ({"optimizer__decay": "5 steps"}, "give both or neither"),
        ({"optimizer__schedule": "wsd", "optimizer__decay": "5k tokens"}, "no part of the duration"),
        ({"optimizer__schedule": "wsd", "optimizer__decay": "101 steps"}, "no part of the duration"),
        ({"optimizer__lr_by_part": {"head": 0.1}}, "lr_by_part"),
        ({"optimizer__lr_by_part": {"tower": 0}}, "lr_by_part.tower"),
        ({"optimizer__lr_by_part": {"tower": 0.1}}, "frozen unless model.train_tower"),
        ({"duration": "1 epoch", "data__sources__0__order": "shards"}, "shuffled by shards"),
        ({"duration": "1 epoch", "data__sources__0__weight": [[0, 1], [5, 2]]}, "schedule of weights"),
        ({"data__sources__0__weight": [[1, 1.0]]}, "begin with 0 and rise"),
        ({"data__sources__0__weight": [[0, 1.0], [0, 2.0]]}, "begin with 0 and rise"),
        ({"data__sources__0__weight": []}, "begin with 0 and rise"),
        ({"data__sources__0__weight": [[0, 0.0], [5, 0.0]]}, "not all 0"),
        ({"data__sources__0__weight": [[0, -1.0], [5, 1.0]]}, "0 or more"),
        ({"data__sources__0__weight": 0}, "more than 0"),
        (
            {"data__sources__0__weight": [[0, 1], [5, 0]], "data__sources__1__weight": [[0, 1], [7, 0]]},
            "from step 7 on no source has a weight",
        ),
        ({"allow_changes": ["batch"]}, "allow_changes"),
        ({"data__sources__0__granularity": 7}, "granularity"),
        ({"data__sources__0__system_prompt": "be brief"}, "a: a system_prompt is for conversations"),
        ({"held_out__sources": [HELD | {"schema": "preference"}]}, "held: held-out data has .* no pairs"),
        ({"held_out__sources": [HELD | {"system_prompt": "be brief"}]}, "held: a system_prompt is for"),
        ({"held_out__sources": [HELD, HELD]}, "distinct names"),
    ],
)
def test_sources_and_stages_that_contradict_themselves(changes, words):
    with pytest.raises(ConfigError, match=words):
        changed(**changes)


@pytest.mark.parametrize("limit", ["step_limit_s", "data_limit_s"])
def test_a_limit_lies_below_the_time_out(limit):
    with pytest.raises(ConfigError, match=f"health.{limit} \\(60\\) must be less than engine.timeout_s \\(60\\)"):
        changed(**{f"health__{limit}": 60, "engine__timeout_s": 60})


def test_unset_limits_lie_below_the_time_out():
    assert all(0 < limit < 60 for limit in changed(engine__timeout_s=60).health.limits_s(60).values())


@pytest.mark.parametrize("other", [{"model__activation_checkpointing": True}, {"engine__debug_collectives": True}])
def test_compiled_blocks_exclude_what_looks_inside(other):
    with pytest.raises(ConfigError, match="compile_blocks excludes"):
        changed(engine__compile_blocks=True, **other)


def test_weights_at_a_step():
    schedules = [[(0, 2.0)], [(0, 0.0), (5, 1.0), (9, 3.0)]]
    assert [weights_at(schedules, step) for step in (0, 4, 5, 8, 9, 99)] == [
        [2, 0], [2, 0], [2, 1], [2, 1], [2, 3], [2, 3]
    ]  # fmt: skip


OPERATIONAL = {
    "run_dir": "elsewhere",
    "resume": "never",
    "stop_after_steps": 3,
    "model__activation_checkpointing": 2,
    "model__attention": "dense",
    "data__decode_workers": 3,
    "data__prefetch_bytes": 4,
    "data__cache_dir": "elsewhere",
    "data__cache_bytes": 5,
    "allow_changes": ["data.sources"],
    "batch__micro_batch_sequences": 2,
    "engine__ranks": 2,
    "engine__ds_config": "other",
    "engine__threads": 3,
    "engine__compile_blocks": True,
    "engine__timeout_s": 5,
    "checkpoint__every_steps": 7,
    "checkpoint__every_minutes": 0.5,
    "checkpoint__keep": 9,
    "log__every_steps": 2,
    "log__picture_every_steps": 7,
    "log__profile_steps": [3],
    "held_out__sources": [{"name": "a", "shards": "held-*.tar", "schema": "caption", "weight": 1}],
    "held_out__every_steps": 7,
    "held_out__batches": 2,
    "deterministic": True,
    "engine__debug_collectives": True,
    "health__max_skipped_in_a_row": 3,
    "health__spike_deviations": 5.0,
    "health__spike_window_steps": 16,
    "health__step_limit_s": 5,
    "health__data_limit_s": 5,
    "health__straggler_every_steps": 5,
    "health__straggler_ratio": 2.0,
    "health__restarts_per_hour": 2,
}
IDENTITY = {
    "seed": 1,
    "duration": "200 steps",
    "model__path": "other",
    "model__train_tower": True,
    "model__grids": [[2, 1]],
    "data__sequence_length": 64,
    "data__max_tiles": 4,
    "data__packing_buffer": 3,
    "data__mixture_unit": "documents",
    "data__dct_scaling": True,
    "data__sources__0__split": "text",
    "data__sources__0__order": "shards",
    "data__sources__0__granularity": 2,
    "data__sources__1__weight": 3,
    "data__sources__1__name": "c",
    "data__sources__0__shards": "c-*.tar",
    "data__sources__0__schema": "ocr",
    "batch__lanes": 8,
    "batch__sequences_per_lane": 2,
    "optimizer__lr": 0.1,
    "optimizer__lr_by_part": {"sampler": 0.1},
    "optimizer__schedule": "linear",
    "optimizer__warmup": "5 steps",
    "optimizer__betas": [0.8, 0.9],
    "optimizer__eps": 1e-6,
    "optimizer__weight_decay": 0.5,
    "optimizer__clip_norm": 0.5,
    "optimizer__min_lr_ratio": 0.5,
    "preference__loss": "ipo",
    "preference__beta": 0.2,
    "preference__label_smoothing": 0.1,
    "preference__sft_weight": 0.5,
    "preference__length_normalized": True,
    "preference__stored_reference": True,
    "engine__precision": "fp32",
}


@pytest.mark.parametrize(("key", "value"), OPERATIONAL.items())
def test_an_operational_field_may_change(key, value):
    other = changed(**{key: value})
    assert other != changed()
    assert identity_changes(changed(), other) == []


@pytest.mark.parametrize(("key", "value"), IDENTITY.items())
def test_an_identity_field_may_not(key, value):
    changes = identity_changes(changed(), changed(**{key: value}))
    assert len(changes) == 1
    assert changes[0].startswith(key.replace("__", ".") + ": ")


def test_the_length_of_a_decay_may_not_change():
    wsd = {"optimizer__schedule": "wsd", "optimizer__decay": "5 steps"}
    other = changed(**wsd | {"optimizer__decay": "6 steps"})
    assert identity_changes(changed(**wsd), other) == ["optimizer.decay: 5 steps -> 6 steps"]


def test_a_system_prompt_may_not_change():
    chat = {"data__sources__0__schema": "conversation"}
    other = changed(**chat, data__sources__0__system_prompt="be brief")
    assert identity_changes(changed(**chat), other) == ["data.sources.0.system_prompt: None -> 'be brief'"]


def test_adapters_may_not_change():
    four, eight = changed(model__lora={"rank": 4}), changed(model__lora={"rank": 8})
    assert identity_changes(four, eight) == ["model.lora.rank: 4 -> 8"]
    assert identity_changes(changed(), four)


def test_every_field_is_in_one_of_these_lists():
    """So that whoever adds a field decides whether a resumed run may change it."""
    listed = {key.replace("__", ".") for key in OPERATIONAL | IDENTITY} | {"optimizer.decay", "model.lora"}
    listed |= {"data.sources.0.system_prompt"}
    dumped = yaml.safe_load(dump_config(changed()))
    assert {re.sub(r"\.[01]\.", ".*.", key) for key in listed} | {"stage"} == set(flat_keys(dumped))


def flat_keys(node, prefix=""):
    if isinstance(node, dict) and node and set(node) != {"value", "unit"}:
        return [name for key, child in node.items() for name in flat_keys(child, f"{prefix}.{key}")]
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return [name for child in node for name in flat_keys(child, f"{prefix}.*")]
    return [prefix.removeprefix(".")]


def test_a_source_that_comes_or_goes_changes_the_identity():
    raw = copy.deepcopy(RECIPE)
    raw["data"]["sources"].pop()
    changes = identity_changes(changed(), parse_config(raw, "test"))
    assert "data.sources.1.name: 'b' -> None" in changes


@given(
    lr=st.floats(1e-12, 1e3, exclude_min=True),
    seed=st.integers(-(2**63), 2**63),
    duration=st.integers(0, 10**15),
    name=st.text(min_size=1, max_size=20),
    shards=st.lists(st.text(max_size=20), max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_what_is_dumped_loads_back_equal(tmp_path_factory, lr, seed, duration, name, shards):
    config = changed(
        optimizer__lr=lr,
        seed=seed,
        duration=f"{duration} tokens",
        data__sources__0__name=name + "'",
        data__sources__1__shards=shards,
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert identity_changes(load_config(path), config) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("stage=dpo",), "takes sources of the schema 'preference' only"),
        (("stage=dpo", "data.sources.0.schema=preference", "data.sources.1.schema=preference"), "needs model.lora"),
        (("data.sources.0.schema=preference",), "a: pairs of answers are for the stage dpo"),
        (("model.lora.rank=8", "model.train_tower=true"), "train_tower and lora exclude each other"),
        (("model.lora.rank=8", "optimizer.lr_by_part={sampler: 1}"), "model.lora freezes"),
    ],
)
def test_adapters_and_pairs_belong_to_their_stages(recipe, overrides, words):
    assert words in refusal(recipe, *overrides)
