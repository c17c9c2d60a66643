"""How a run is doing, by what Megatron, its launcher and Slurm have left: for ``sla-job show``.

steps.py       the iterations that Megatron logs, in a file of any size
rank_logs.py   the logs of an attempt's ranks
reasons.py     why an attempt ended
events.py      the same iterations in TensorBoard's files
queue.py       what Slurm says of the job
report.py      all of it as one object
text.py        that object in lines

Imports the standard library alone, but for TensorBoard's files, where those are read.
"""
