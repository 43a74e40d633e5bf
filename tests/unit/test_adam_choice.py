"""Which Adam Megatron's optimizers are built of."""

from __future__ import annotations

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
import pytest
import torch

from sead_megatron.parallel.megatron_on_cpu import GroupStepAdam, use_group_step_adam_without_fused


@pytest.mark.parametrize("fused_is_installed", [False, True])
def test_torchs_adam_is_replaced_and_a_fused_one_kept(
    fused_is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of torch's Adam under the distributed optimizer cannot be loaded (`assert len(steps) == 1`)."""
    monkeypatch.setattr(megatron_optimizer, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", not fused_is_installed)
    monkeypatch.setattr(distributed_optimizer, "HAVE_APEX_OR_TE", fused_is_installed)
    for name in ("Adam", "USING_APEX_OPTIMIZER"):
        monkeypatch.setattr(
            distributed_optimizer, name, getattr(distributed_optimizer, name, None), raising=False
        )
    use_group_step_adam_without_fused()
    assert megatron_optimizer.Adam is (torch.optim.AdamW if fused_is_installed else GroupStepAdam)
    assert distributed_optimizer.HAVE_APEX_OR_TE
