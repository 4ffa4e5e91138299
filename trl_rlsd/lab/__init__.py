"""The lab: does a method help, on the same start and the same problems, over several seeds?

compare  methods x seeds -> runs -> one table and one picture; what `trl-rlsd compare` does
configs  the same for config files of the user's
report   statistics, table, picture
builtin  one run on the built-in task
trainer  RLSDTrainer where the first wrong token is known: labels, and where the blame goes
measure  sampled and greedy accuracy on held-out problems while a run trains
credit   an oracle and a control
start    the small model that every run on the built-in task starts from
task     chains of arithmetic steps
"""
