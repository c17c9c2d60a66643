"""``sla-job``: what a launcher asks before, beside and after each attempt of a job.

cli.py         the commands, for launch/slurm.sbatch and people; each is a module NAME_command.py
arguments.py   what they take in common
chain.py       the attempts of a run so far, and what follows from them
flags.py       what they depend on of Megatron's flags
progress/      how a run is doing, by logs and by what Slurm says
"""
