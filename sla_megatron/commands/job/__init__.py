"""``sla-job``: what a launcher asks before and after each attempt of a job.

chain.py   the attempts of a run so far, and what follows from them
flags.py   what they depend on of Megatron's flags
cli.py     the commands, for launch/slurm.sbatch
"""
