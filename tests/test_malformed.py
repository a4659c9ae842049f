"""Whatever file it meets: one line that names the file and what is wrong, exit status 2, in little time and memory."""

import pytest

from tools.malformed import CASES, Base, problem, run


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case, base, tmp_path):
    assert (wrong := problem(case, run(case, base, tmp_path))) is None, wrong
