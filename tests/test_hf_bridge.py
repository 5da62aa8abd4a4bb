"""The optional Megatron-Bridge plug-in: refused where it must not or cannot run, called as documented otherwise."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types

import pytest

from megatron_gft.errors import InputError
from megatron_gft.hf.bridge import bridge_hf_to_megatron, bridge_megatron_to_hf


@pytest.fixture
def unmapped(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    return folder


@pytest.fixture
def fake_bridge(monkeypatch):
    """A stand-in that records its calls; not the real package."""
    calls = []

    class AutoBridge:
        @staticmethod
        def import_ckpt(source, target):
            calls.append(("import", source))

        @classmethod
        def from_hf_pretrained(cls, source):
            calls.append(("from", source))
            return cls()

        def export_ckpt(self, source, target):
            calls.append(("export", source))

    module = types.ModuleType("megatron.bridge")
    module.AutoBridge = AutoBridge
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.2")
    return calls


def test_mapped_families_never_use_it(tmp_path, fake_bridge):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="converts this family itself"):
        bridge_hf_to_megatron(tmp_path, tmp_path / "out")
    assert fake_bridge == []


def test_absent_says_what_to_install(unmapped, tmp_path):
    with pytest.raises(InputError, match=r"install megatron-bridge>=0\.6"):
        bridge_hf_to_megatron(unmapped, tmp_path / "out")


def test_old_versions_are_refused(unmapped, tmp_path, fake_bridge, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.1")
    with pytest.raises(InputError, match=r"0\.3\.1 is installed"):
        bridge_megatron_to_hf(tmp_path / "ckpt", tmp_path / "out", unmapped)
    assert fake_bridge == []


def test_calls(unmapped, tmp_path, fake_bridge):
    bridge_hf_to_megatron(unmapped, tmp_path / "ckpt")
    bridge_megatron_to_hf(tmp_path / "ckpt", tmp_path / "out", unmapped)
    assert fake_bridge == [("import", str(unmapped)), ("from", str(unmapped)), ("export", str(tmp_path / "ckpt"))]
    assert (tmp_path / "ckpt").is_dir() and (tmp_path / "out").is_dir()
