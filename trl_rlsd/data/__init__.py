"""Datasets with a privileged column, from data as it is, from a model, or from a generator of problems:

    load           rows from datasets as they are: load_rows, by presets or columns
    privileged     the privileged context of a row: answer, trace, tests, schema, documents within a budget
    contamination  rows whose prompt holds what only the teacher may read
    traces         worked solutions from a model, kept where a reward accepts them
    pass_rate      how often a model solves a row
    curriculum     rows in order of difficulty, in stages that advance on reward
    reasoning_gym  problems of reasoning-gym

Some need an extra of their own.
"""

# tokens of a row's documents that were beyond their budget; training logs it as rlsd/privileged_tokens_cut
CUT_COLUMN = "privileged_tokens_cut"
