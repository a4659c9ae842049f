"""Configurations of training in YAML, and overrides of single keys."""

import os
from pathlib import Path

import yaml

from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed
from tools.malformed.running import MARK

YAML, OVERRIDE = "configuration", "override of a key"
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{number}: &a{number} [{','.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)
"""An alias in aliases in aliases: 9 to the power of 12 values."""


def text(base: Base, out: Path, content: str | bytes) -> list[str]:
    return base.train_with(parts.write(out / "a.yaml", content), out)


def changed(base: Base, out: Path, section: str, **values: object) -> list[str]:
    settings = yaml.safe_load(base.config.read_text())
    settings.setdefault(section, {}).update(values)
    return text(base, out, yaml.safe_dump(settings))


def overridden(base: Base, out: Path, assignment: str) -> list[str]:
    return base.train_with(base.config, out, "--set", assignment)


@malformed(YAML, "a.yaml", "too many values once its aliases are written out")
def yaml_aliases_of_aliases(base: Base, out: Path) -> list[str]:
    return text(base, out, LAUGHS + "model: {name: *a11}\n")


@malformed(YAML, "a.yaml", "an alias in it contains itself")
def yaml_endless_alias(base: Base, out: Path) -> list[str]:
    return text(base, out, "model: {overrides: &a {depth: *a}}\n")


@malformed(YAML, "a.yaml", "not YAML: .*python/object")
def yaml_runs_code(base: Base, out: Path) -> list[str]:
    return text(base, out, f"model: !!python/object/apply:os.mkdir ['{out / MARK}']\n")


@malformed(YAML, "a.yaml", "the key 'optim' is there twice")
def yaml_section_twice(base: Base, out: Path) -> list[str]:
    return text(base, out, base.config.read_text() + "optim: {steps: 1}\n")


@malformed(YAML, "a.yaml", "the key 'steps' is there twice")
def yaml_key_twice(base: Base, out: Path) -> list[str]:
    return text(base, out, "optim: {steps: 1, lr: 0.1, steps: 2}\n")


@malformed(YAML, "a.yaml", "nested too deep")
def yaml_is_deep(base: Base, out: Path) -> list[str]:
    return text(base, out, "[" * 600)


@malformed(YAML, "a.yaml", "too large")
def yaml_of_two_megabytes(base: Base, out: Path) -> list[str]:
    return text(base, out, "#" * (2 << 20))


@malformed(YAML, "a.yaml", "not YAML")
def yaml_with_zeros(base: Base, out: Path) -> list[str]:
    return text(base, out, base.config.read_bytes() + bytes(100))


@malformed(YAML, "a.yaml", "not YAML")
def yaml_is_not_utf8(base: Base, out: Path) -> list[str]:
    return text(base, out, b"model: {name: \xff\xfe}\n")


@malformed(YAML, "a.yaml", "web page")
def yaml_is_a_web_page(base: Base, out: Path) -> list[str]:
    return text(base, out, parts.PAGE)


@malformed(YAML, "a.yaml", "holds a list; accepted: a mapping")
def yaml_is_a_list(base: Base, out: Path) -> list[str]:
    return text(base, out, "- model\n- data\n")


@malformed(YAML, "a.yaml", "named pipe")
def yaml_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "a.yaml")
    return base.train_with(out / "a.yaml", out)


@malformed(YAML, "a.yaml", r"optim\.lr is 1000.*\.\.\..*; accepted: float")
def yaml_number_of_400_digits(base: Base, out: Path) -> list[str]:
    return text(base, out, "optim: {lr: 1" + "0" * 400 + "}\n")


@malformed(YAML, "a.yaml", "not YAML")
def yaml_number_of_5000_digits(base: Base, out: Path) -> list[str]:
    return text(base, out, "optim: {steps: 1" + "0" * 5000 + "}\n")


@malformed(YAML, "a.yaml", r"optim\.lr is nan; accepted: float")
def yaml_rate_is_nan(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", lr=float("nan"))


@malformed(YAML, "a.yaml", r"optim\.steps is True; accepted: int")
def yaml_steps_are_true(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", steps=True)


@malformed(YAML, "a.yaml", r"optim\.steps is '2'; accepted: int")
def yaml_steps_are_text(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", steps="2")


@malformed(YAML, "a.yaml", r"optim\.batch_size is -4; accepted: at least 1")
def yaml_negative_batch(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", batch_size=-4)


@malformed(YAML, "a.yaml", r"optim\.batch_size is 1000000000000")
def yaml_batch_of_a_trillion(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", batch_size=10**12)


@malformed(YAML, "a.yaml", r"data\.workers is 1000000; accepted: .* at most 256")
def yaml_a_million_processes(base: Base, out: Path) -> list[str]:
    return changed(base, out, "data", workers=10**6)


@malformed(YAML, "a.yaml", "unknown configuration key 'optim.stepz'.*did you mean 'steps'")
def yaml_unknown_key(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", stepz=2)


@malformed(YAML, "a.yaml", "unknown configuration key")
def yaml_key_with_escape_codes(base: Base, out: Path) -> list[str]:
    return changed(base, out, "optim", **{parts.FORGED: 1})


@malformed(YAML, "a.yaml", "optim is .*; accepted: a section of keys")
def yaml_section_is_a_list(base: Base, out: Path) -> list[str]:
    return text(base, out, "optim: [1, 2]\n")


@malformed(YAML, "a.yaml", "depth is '12'")
def yaml_depth_is_text(base: Base, out: Path) -> list[str]:
    return changed(base, out, "model", overrides={"depth": "12"})


@malformed(YAML, "a.yaml", "grid is .*two positive integers")
def yaml_grid_is_negative(base: Base, out: Path) -> list[str]:
    return changed(base, out, "model", overrides={"grid": [-8, 8]})


@malformed(YAML, "a.yaml", "unknown preset 'DC-DIT-S'")
def yaml_unknown_preset(base: Base, out: Path) -> list[str]:
    return changed(base, out, "model", name="DC-DIT-S")


@malformed(OVERRIDE, "depth", "depth is 100000000; accepted")
def override_depth_of_a_hundred_million(base: Base, out: Path) -> list[str]:
    return overridden(base, out, "model.overrides.depth=100000000")


@malformed(OVERRIDE, "optim.seed", "is 18446744073709551616; accepted")
def override_seed_of_2_to_the_64(base: Base, out: Path) -> list[str]:
    return overridden(base, out, f"optim.seed={2**64}")


@malformed(OVERRIDE, "optim.lr", "is there twice")
def override_with_a_key_twice(base: Base, out: Path) -> list[str]:
    return overridden(base, out, "optim.lr={a: 1, a: 2}")


@malformed(OVERRIDE, "model", "unknown preset")
def override_with_escape_codes(base: Base, out: Path) -> list[str]:
    return overridden(base, out, 'model.name="\\e[31mDC-DiT-S"')
