"""Sweeps: a search space, an Optuna study of it, and workers that train its trials.

grammar.py     a word of the command line, by Hydra's override parser
space.py       what the words search, and the words of a point
settings.py    the sections `sweep` and `launcher`
sampler.py     where points come from, what ends trials early
definition.py  what a study is, as it is written down and compared
storage.py     where a study lies: a journal file or a database, with patience
places.py      its folder, the address of its storage
locks.py       which trials are held
claim.py       a trial in the hands of a worker
study.py       its trials, who takes which, when it is done
rows.py        its trials as they are shown
trial.py       one trial: its run folders, its value
groups.py      which points are trained together
vectorize.py   their trials: claimed, trained and told together
worker.py      a process that takes one trial after another
devices.py     which devices this machine gives to workers
pool.py        the workers of this machine
slurm.py       the same under SLURM
table.py       what the user sees
"""
