"""Two processes on CPU, over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("liger", [False, True], ids=["default", "liger"])
def test_two_processes_log_the_means_of_all_rows(tmp_path, liger):
    """Metrics over ranks are sums over counts, not means of means; and both ranks end with the same weights."""
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from conftest import *\n"
        "import torch.distributed as dist\n"
        "def reward(completions, **k):\n"
        "    return [float(i % 4) for i in range(len(completions))] if dist.get_rank() == 0 else "
        "[0.0, 1.0, 2.0, 3.0, *[1.0] * (len(completions) - 4)]\n"
        "t = trainer('out', peft_config=lora(), reward=reward, per_device_train_batch_size=8, max_steps=2, "
        f"use_liger_loss={liger})\n"
        "seen = []\n"
        "original = t._token_credit\n"
        "def spy(inputs, logps, rows=None):\n"
        "    if rows is not None:\n"
        "        return original(inputs, logps, rows)\n"
        "    gains = (inputs['teacher_logps'] - logps).double()\n"
        "    mask = (inputs['completion_mask'] * inputs['teacher_scored'].unsqueeze(1)).bool()\n"
        "    seen.append([gains[mask].sum().item(), mask.sum().item()])\n"
        "    return original(inputs, logps)\n"
        "t._token_credit = spy\n"
        "t.train()\n"
        "w = torch.cat([p.detach().flatten() for p in t.model.parameters() if p.requires_grad])\n"
        "torch.save({'seen': seen, 'weights': w, 'logs': t.state.log_history}, f'rank{dist.get_rank()}.pt')\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    for step in range(2):
        totals = [sum(rank["seen"][step][k] for rank in ranks) for k in range(2)]
        assert ranks[0]["seen"][step][1] != ranks[1]["seen"][step][1], "equal counts would hide a mean of means"
        assert ranks[0]["logs"][step]["rlsd/gain_mean"] == pytest.approx(totals[0] / totals[1], rel=1e-5)
        assert ranks[0]["logs"][step]["rlsd/skipped"] == 0.25
