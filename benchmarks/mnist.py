"""MNIST with wrong labels: the papers' protocol, and the choice of `co_lambda`.

    python benchmarks/mnist.py official --path FOLDER   # 200 epochs, symmetric 50%, k = 2 and 3
    python benchmarks/mnist.py lambda --path FOLDER     # 40 epochs, co_lambda from 0.5 to 0.97, k = 2 and 3

FOLDER holds MNIST/raw, torchvision's layout. Finished runs under benchmarks/results/ are not repeated.
"""
from pathlib import Path
from fastcore.script import call_parse
from fastai_jocor.bench import RunConfig, run_grid

RESULTS = Path(__file__).resolve().parent/'results'

def official(): return [RunConfig('mnist', k=k, epochs=200, seed=0) for k in (2,3)]
def choose_lambda():
    return [RunConfig('mnist', k=k, co_lambda=lam, epochs=40, seed=s) for s in range(3) for lam in (.9,.7,.95,.8,.97,.5) for k in (3,2)]

@call_parse
def main(
    grid:str, # official or lambda
    path:str=None, # Folder that holds MNIST/raw
    n_jobs:int=-1 # Runs side by side; -1 for one a core
):
    "Run a grid and write its table"
    cfgs = {'official': official, 'lambda': choose_lambda}[grid]()
    df = run_grid(cfgs, RESULTS/f'mnist_{grid}', path, n_jobs)
    df.to_csv(RESULTS/f'mnist_{grid}.csv', index=False, float_format='%.6g')
    print(df.groupby(['k','co_lambda'])[['peer_accuracy','ensemble_accuracy','label_precision','best_accuracy','seconds']].agg(['mean','std']).round(4).to_string())
