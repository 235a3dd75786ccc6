"""Sweeps: a search space, an Optuna study of it, and workers that train its trials.

space.py     what the words of a command line search, by Hydra's override grammar
settings.py  the sections `sweep` and `launcher`
storage.py   where a study lies: a journal file or a database, with patience
study.py     the study: its trials, who holds which, when it is done
trial.py     one trial: its run folders, its value
worker.py    a process that takes one trial after another
pool.py      the workers of this machine, one per device
slurm.py     the same under SLURM
table.py     what the user sees
"""
