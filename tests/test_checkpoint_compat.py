"""Checkpoints across Megatron-Core releases."""

import megatron.core
import pytest

from megatron_gft.checkpoints.compat import loadable_sharded_state_dict
from megatron_gft.conversion.convert import hf_to_megatron
from megatron_gft.errors import InputError


@pytest.mark.parametrize(("release", "refused"), [("0.16.1", True), ("0.18.2", True), ("0.19.0", False)])
def test_a_checkpoint_of_a_later_release_is_refused(tiny, tmp_path, monkeypatch, release, refused):
    """0.19 stores the common state among the shards and writes no common.pt."""
    hf_to_megatron(tiny("qwen2"), tmp_path / "ckpt")
    monkeypatch.setattr(megatron.core, "__version__", release)
    assert loadable_sharded_state_dict({}, tmp_path / "ckpt") == {}
    (tmp_path / "ckpt" / "common.pt").unlink()
    if refused:
        with pytest.raises(InputError, match=f"{release} cannot load it -> install megatron-core>=0.19"):
            loadable_sharded_state_dict({}, tmp_path / "ckpt")
    else:
        assert loadable_sharded_state_dict({}, tmp_path / "ckpt") == {}
