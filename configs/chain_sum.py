"""The problems of `trl-rlsd quickstart` as `dataset_name`: sums of two digits, a quarter of them held out."""

from datasets import Dataset

from trl_rlsd.data.reasoning_gym import reasoning_gym_dataset
from trl_rlsd.quickstart import HELD_OUT, INSTRUCTION, PROBLEMS, TASK


def splits() -> dict[str, Dataset]:
    problems = reasoning_gym_dataset(size=PROBLEMS, seed=0, system_prompt=INSTRUCTION, **TASK)
    return {"train": problems.select(range(HELD_OUT, PROBLEMS)), "test": problems.select(range(HELD_OUT))}
