"""The apex of PyPI is told from NVIDIA's without importing either."""

import sys

import pytest

from megatron_gft.validation import APEX_MODULES, apex_problem


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """A package named apex on the path that cannot be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_of_another_project\n")
    return tmp_path / "apex"


@pytest.mark.parametrize("modules", [(), APEX_MODULES[:1], APEX_MODULES])
def test_nvidias_apex_passes_and_another_is_named(apex, modules):
    for name in modules:
        (apex / name).mkdir()
    problem = apex_problem()
    if modules == APEX_MODULES:
        assert problem is None
    else:
        assert str(apex) in problem and "is not NVIDIA's" in problem and "pip uninstall apex" in problem


def test_no_apex_is_no_problem(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert apex_problem() is None
