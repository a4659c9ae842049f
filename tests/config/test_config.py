"""Configuration: round trip, overrides, documentation, and one test per way to get it wrong."""

import dataclasses
from pathlib import Path

import pytest

from dcdit.config import (
    TrainConfig,
    describe,
    dump_yaml,
    from_dict,
    given_keys,
    load_config,
    override,
    parse_overrides,
    parse_value,
    recipes,
    to_dict,
)

CONFIGS = sorted((Path(__file__).parents[2] / "dcdit" / "config" / "recipes").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_text(text)
        return tmp_path / "a.yaml"

    return write


def test_defaults_are_the_published_recipe():
    config = load_config()
    assert config == TrainConfig()
    optim, router = config.optim, config.router
    assert (optim.lr, optim.weight_decay, optim.batch_size, optim.ema_decay, optim.grad_clip) == (
        1e-4,
        0,
        256,
        0.9999,
        1,
    )
    assert (router.loss_weight, router.group_size, router.drop_warmup_steps) == (0.03, 16, 5000)
    assert router.drop_fractions == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_file_then_overrides(write):
    path = write("optim: {lr: 3e-4, steps: 7}\nmodel:\n  overrides: {hidden_size: 128}\ndata:\n")
    config = load_config(
        path, ["optim.lr=1e-5", "model.overrides.grid=[8, 8]", "router.group_size=null", "optim.lr=2e-5"]
    )
    assert (config.optim.lr, config.optim.steps, config.router.group_size) == (2e-5, 7, None)
    assert config.model.overrides == {"hidden_size": 128, "grid": [8, 8]}


def test_override_leaves_its_input_alone():
    data = {"optim": {"lr": 1e-3}}
    assert override(data, ["optim.lr=1"]).optim.lr == 1.0
    assert data == {"optim": {"lr": 1e-3}}


def test_programs_override_with_values(write):
    """Typed values, at the same keys as texts, on a file, on dicts and on a configuration."""
    values = {"run.out": "2024", "optim.flops": None, "model.overrides.grid": [8, 8], "router.drop_fractions": [0, 0.5]}
    texts = ["run.out='2024'", "optim.flops=null", "model.overrides.grid=[8, 8]", "router.drop_fractions=[0, 0.5]"]
    path = write("model:\n  overrides: {hidden_size: 128}\noptim: {flops: 3}\n")
    config = load_config(path, values)
    assert config == load_config(path, texts)
    assert config == override(given_keys(path), values) == override(load_config(path), values)
    assert (config.run.out, config.model.overrides) == ("2024", {"hidden_size": 128, "grid": [8, 8]})
    config.model.overrides["grid"].append(1)
    assert values["model.overrides.grid"] == [8, 8]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"run": {"out": "a"}}, ValueError, r"override 'run'; accepted: section\.key, e\.g\. optim\.lr"),
        ({"run.out": Path("a")}, TypeError, r"run\.out is PosixPath\('a'\); accepted: text"),
        ({"optim.lr.x": 1}, ValueError, r"override 'optim\.lr\.x' enters 'lr', which is not a section"),
        ({"optim.lrr": 1}, ValueError, r"unknown configuration key 'optim\.lrr'"),
    ],
)
def test_bad_values(values, kind, message):
    with pytest.raises(kind, match=message) as error:
        override(TrainConfig(), values)
    assert "\n" not in str(error.value)


def test_the_last_assignment_of_a_key_counts():
    texts = ["model.overrides={depth: 1}", "model.overrides.depth=2", "model.overrides={num_heads: 3}", "optim.lr=1"]
    assert parse_overrides(texts) == {"model.overrides.depth": 2, "model.overrides": {"num_heads": 3}, "optim.lr": 1}
    assert load_config(None, texts).model.overrides == {"num_heads": 3}


def test_flags_are_read_by_the_type_of_their_key():
    """A folder called 2024 is text, a number of steps is not."""
    assert [parse_value(key, "2024") for key in ("run.out", "data.path", "optim.steps")] == ["2024", "2024", 2024]
    assert [parse_value(key, "null") for key in ("data.path", "optim.flops")] == ["null", None]
    with pytest.raises(ValueError, match=r"override 'optim\.steps=\[' has a value that is not YAML"):
        parse_value("optim.steps", "[")


def test_round_trips(write):
    config = load_config(
        None, ["run.minutes=2", "data.path='x y: z'", "optim.compile=true", "router.drop_fractions=[0, 0.25]"]
    )
    assert from_dict(to_dict(config)) == config
    assert load_config(write(dump_yaml(config))) == config


def test_defaults_are_not_shared():
    TrainConfig().router.drop_fractions.append(0.9)
    assert TrainConfig().router.drop_fractions[-1] == 0.6


def test_every_key_is_described():
    text = describe()
    config = TrainConfig()
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            assert f"{section.name}.{field.name} " in text
            assert len(field.metadata["doc"]) > 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    load_config(path)


def test_there_are_shipped_configurations():
    assert CONFIGS


@pytest.mark.parametrize(
    ("assignment", "kind", "message"),
    [
        (
            "optim.lrr=1",
            ValueError,
            r"unknown configuration key 'optim\.lrr'; accepted: steps, .*; did you mean 'lr'\?",
        ),
        ("optm.lr=1", ValueError, r"unknown configuration key 'optm'; accepted: model, .*did you mean 'optim'\?"),
        ("optim.lr=fast", TypeError, r"optim\.lr is 'fast'; accepted: float"),
        ("optim.lr=true", TypeError, r"optim\.lr is True; accepted: float"),
        ("optim.lr=.nan", TypeError, r"optim\.lr is nan; accepted: float"),
        ("optim.lr=-1", ValueError, r"optim\.lr is -1\.0; accepted: at least 0"),
        ("optim.steps=1.5", TypeError, r"optim\.steps is 1\.5; accepted: int"),
        ("optim.steps=0", ValueError, r"optim\.steps is 0; accepted: at least 1"),
        ("optim.compile=1", TypeError, r"optim\.compile is 1; accepted: bool"),
        ("optim.ema_decay=1", ValueError, r"optim\.ema_decay is 1\.0; accepted: at least 0 and below 1"),
        ("router.group_size=x", TypeError, r"router\.group_size is 'x'; accepted: int or null"),
        ("router.target=1", ValueError, r"router\.target is 1\.0; accepted: above 1"),
        ("router.target_start=2", ValueError, r"target_start is 2\.0 and .*steps is 0; accepted: both or neither"),
        ("router.target_warmup_steps=9", ValueError, r"target_start is None and .*is 9; accepted: both or neither"),
        ("router.drop_fractions=0.5", TypeError, r"router\.drop_fractions is 0\.5; accepted: list of float"),
        ("router.drop_fractions=[a]", TypeError, r"router\.drop_fractions\[0\] is 'a'; accepted: float"),
        ("router.drop_fractions=[0, 1]", ValueError, r"is \[0\.0, 1\.0\]; accepted: .* numbers at least 0 and below 1"),
        ("router.drop_fractions=[]", ValueError, r"is \[\]; accepted: a non-empty list"),
        (
            "run.trackers=[tensorbord]",
            ValueError,
            r"is \['tensorbord'\]; accepted: a non-empty list of tensorboard, wandb",
        ),
        ("data.kind=foldr", ValueError, r"data\.kind is 'foldr'; accepted: folder, .*did you mean 'folder'\?"),
        ("data.path=3", TypeError, r"data\.path is 3; accepted: text or null"),
        ("model.overrides=[1]", TypeError, r"model\.overrides is \[1\]; accepted: mapping"),
        ("optim.lr.x=1", ValueError, None),
        ("optim", ValueError, r"override 'optim'; accepted: section\.key=value"),
        ("optim=3", ValueError, r"override 'optim=3'; accepted: section\.key=value"),
        ("optim.lr=[", ValueError, "has a value that is not YAML"),
    ],
)
def test_bad_override(assignment, kind, message):
    data = {"optim": {"lr": 0.1}}
    with pytest.raises(kind, match=message) as error:
        override(data, [assignment])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: [", "is not YAML"),
        ("- 1", "holds a list; accepted: a mapping of sections"),
        ("optim: 3", "optim is 3; accepted: a section of keys"),
        ("speed: 3", "unknown configuration key 'speed'"),
        ("1: 3", "unknown configuration key '1'"),
    ],
)
def test_bad_file(write, text, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_recipes_have_names(tmp_path, monkeypatch):
    """A file of that name goes first, and a near miss is named."""
    assert list(recipes().values()) == CONFIGS
    for path in CONFIGS:
        assert load_config(path.stem) == load_config(path)
    with pytest.raises(FileNotFoundError, match=r"one of dc-dit-b-256, .*; did you mean 'dc-dit-s-256'"):
        load_config("dc-dit-s-265")
    monkeypatch.chdir(tmp_path)
    Path("dc-dit-s-256").write_text("optim: {steps: 7}")
    assert load_config("dc-dit-s-256").optim.steps == 7
