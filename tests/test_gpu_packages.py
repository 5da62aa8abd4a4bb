"""The apex of PyPI is told from NVIDIA's without importing either."""

import sys

import pytest

from megatron_gft.gpu_packages import APEX_MODULES, apex_problem


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """A package named apex on the path that cannot be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_of_another_project\n")
    return tmp_path / "apex"


def test_a_wrong_apex_is_named(apex):
    problem = apex_problem()
    assert problem is not None and str(apex) in problem
    assert "is not NVIDIA's" in problem and "pip uninstall apex" in problem


def test_nvidias_apex_passes(apex):
    for name in APEX_MODULES:
        (apex / name).mkdir()
    assert apex_problem() is None


def test_no_apex_is_no_problem(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert apex_problem() is None
