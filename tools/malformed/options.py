"""Values of options that no command can serve."""

from pathlib import Path

from tools.malformed.base import Base
from tools.malformed.case import malformed

OPTION = "option"


@malformed(OPTION, "--seed", "18446744073709551616; accepted: 0 to")
def option_seed_of_2_to_the_64(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--seed", str(2**64))


@malformed(OPTION, "--seed", "-1; accepted: 0 to")
def option_negative_seed(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--seed", "-1")


@malformed(OPTION, "--num", "accepted: at most")
def option_a_trillion_samples(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--num", str(10**12))


@malformed(OPTION, "--num", "accepted: at most")
def option_a_trillion_images(base: Base, out: Path) -> list[str]:
    return base.draw(out, "--num", str(10**12))


@malformed(OPTION, "--steps", "accepted: at most")
def option_a_trillion_steps(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--steps", str(10**12))


@malformed(OPTION, "cfg_scale", "is nan; accepted: a finite number")
def option_guidance_is_nan(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--cfg-scale", "nan")


@malformed(OPTION, "label", "1000000000000; accepted: a class name or a number from 0 to 3")
def option_label_of_a_trillion(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--labels", str(10**12))


@malformed(OPTION, "--seconds", "is inf; accepted: a finite number")
def option_endless_timing(base: Base, out: Path) -> list[str]:
    return ["profile", "--checkpoint", str(base.model), "--device", "cpu", "--seconds", "inf", "--out", str(out)]


@malformed(OPTION, "--drop-fraction", "is nan; accepted")
def option_fraction_is_nan(base: Base, out: Path) -> list[str]:
    return ["profile", "--checkpoint", str(base.model), "--device", "cpu", "--drop-fraction", "nan", "--out", str(out)]


@malformed(OPTION, "size", "is 1000000; accepted: 1 to 8192 pixels")
def option_size_of_a_million(base: Base, out: Path) -> list[str]:
    return base.extract(base.images, base.vae, out, "--size", "1000000")


@malformed(OPTION, "--workers", "is 1000000; accepted: 0 to")
def option_a_million_processes(base: Base, out: Path) -> list[str]:
    return base.extract(base.images, base.vae, out, "--workers", "1000000")


@malformed(OPTION, "--minutes", "is nan; accepted")
def option_minutes_are_nan(base: Base, out: Path) -> list[str]:
    return ["demo", "--minutes", "nan", "--out", str(out / "demo")]


@malformed(OPTION, "drop schedule", "accepted: constant")
def option_schedule_with_escape_codes(base: Base, out: Path) -> list[str]:
    return base.sample(base.model, out, "--drop-schedule", "\x1b[31mlinear:0:1")
