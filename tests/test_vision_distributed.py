"""Images on two processes: DDP's update where the weights are sharded, and nobody waits for one without images."""

from pathlib import Path

import pytest
import torch
from conftest import run_on_two_ranks


pytestmark = pytest.mark.slow  # two engines with two processes each

TESTS = str(Path(__file__).parent)
SCRIPT = """
import sys
sys.path.insert(0, TESTS)
ENGINE = NAMED
if ENGINE == "fsdp2":
    import fsdp_cpu
from datetime import timedelta
import torch
from torch import distributed
from conftest import config
from test_vision import varied
from vlm_models import image_dataset, tiny_qwen3_vl
from trl_rlsd import RLSDTrainer, shards

distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
LAYERS = ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]
FSDP = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": LAYERS}} if ENGINE == "fsdp2" else {}


def train(name, data, **options):
    model, processor = tiny_qwen3_vl()
    # SGD: Adam would make a step of any size of what rounding leaves of a gradient that is 0
    options = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 6, "optim": "sgd",
                "learning_rate": 0.05, "rlsd_lambda_decay_steps": 0, "shuffle_dataset": False, **FSDP, **options}
    built = RLSDTrainer(model, varied, config(name, **options), data, processing_class=processor)
    start = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    built.train()
    shards.drop_gathered(built.model)
    held = dict(built.model.named_parameters())
    end = {name: p.full_tensor() if shards.is_sharded(p) else p for name, p in held.items()}
    return {name: end[name].detach() - start[name] for name in start}, built.state.log_history


results = {}
for steps in (1, 2):
    data = image_dataset(8)
    results[f"accumulation {steps}"] = train("out", data, max_steps=1, gradient_accumulation_steps=steps)
if ENGINE == "ddp":
    results["mixed"] = train("mixed", image_dataset(8, mixed=True), max_steps=3)
else:
    try:
        train("mixed", image_dataset(8, mixed=True))
    except ValueError as error:
        results["refused"] = str(error)
torch.save(results, f"rank{distributed.get_rank()}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return {
        engine: run_on_two_ranks(
            tmp_path_factory.mktemp(engine), SCRIPT.replace("TESTS", repr(TESTS)).replace("NAMED", repr(engine))
        )
        for engine in ("ddp", "fsdp2")
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_sharded_head_gets_the_gradient_of_all_processes(ranks, accumulation):
    """Accelerate shards Qwen3-VL's head as a unit of its own, which TRL's fused head does not call."""
    expected, update = (ranks[engine][0][f"accumulation {accumulation}"][0] for engine in ("ddp", "fsdp2"))
    assert expected["lm_head.weight"].norm() > 1e-4
    for name, own in expected.items():
        assert (update[name] - own).norm() <= 1e-4 * max(own.norm(), 1e-3), name


def test_a_process_without_images_holds_up_nobody(ranks):
    (first, logs), (second, _) = (rank["mixed"] for rank in ranks["ddp"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum("rlsd/gain_mean" in log for log in logs) == 3


def test_sharded_weights_and_rows_without_images_are_refused(ranks):
    for rank in ranks["fsdp2"]:
        assert "Some rows of the dataset have no image" in rank["refused"]
