"""``sla-job``: what a launcher asks before, beside and after each attempt of a job.

cli.py         the commands, for launch/slurm.sbatch and people; each is a module NAME_command.py
arguments.py   what they take in common
attendance.py  what is done beside a training
chain.py       the attempts of a run so far, and what follows from them
checked.py     which checkpoints were looked into, and what was found
flags.py       what they depend on of Megatron's flags
keep.py        how many checkpoints stay
launching.py   a training as the words of one command, for torchrun, srun and ft_launcher
progress/      how a run is doing, by logs and by what Slurm says
resources.py   what Slurm gave a job, beside what its ranks need
script_flags.py  which flags a script of the user's own takes
"""
