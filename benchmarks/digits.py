"""Digits with half of the labels wrong, a small data set: `co_lambda` and the rise of the forget rate in short one-cycle runs.

    python benchmarks/digits.py lambda    # co_lambda from 0.5 to 0.95, k = 2 and 3, two learning rates, three seeds
    python benchmarks/digits.py gradual   # num_gradual 10 against the default, co_lambda 0.8 and 0.9, k = 2 and 3, three seeds
"""
from pathlib import Path
from fastcore.script import call_parse
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.grid import run_grid

RESULTS = Path(__file__).resolve().parent/'results'
SHORT = dict(bs=64, epochs=40, schedule='one_cycle')

def several_lambdas():
    return [RunConfig(k=k, co_lambda=lam, lr=lr, seed=s, **SHORT) for k in (2,3) for lr in (6e-3,2e-2) for lam in (.5,.7,.8,.9,.95) for s in range(3)]
def rises():
    return [RunConfig(k=k, co_lambda=lam, num_gradual=g, lr=4e-3, seed=s, **{**SHORT, 'epochs': 60}) for lam in (.8,.9) for k in (2,3) for g in (10,None) for s in range(3)]

@call_parse
def main(
    grid:str, # lambda or gradual
    n_jobs:int=-1 # Runs side by side; -1 for one a core
):
    "Run a grid and write its table"
    df = run_grid({'lambda': several_lambdas, 'gradual': rises}[grid](), RESULTS/'digits', n_jobs=n_jobs)
    df.drop(columns='seconds').to_csv(RESULTS/f'digits_{grid}.csv', index=False, float_format='%.6g')
    print(df.groupby(['k','lr','co_lambda','num_gradual'], dropna=False)[['last_accuracy','label_recall','best_accuracy']].agg(['mean','min']).round(4).to_string())
