"""MNIST with symmetric noise of rate 0.5: the papers' protocol in full, and `co_lambda` in short one-cycle runs.

    python benchmarks/mnist.py protocol --path FOLDER   # 200 epochs, Adam, perceptron, batch 128; k = 2 and 3; 10 to 20 minutes a run
    python benchmarks/mnist.py lambda --path FOLDER     # 10 one-cycle epochs, co_lambda from 0.5 to 0.95, k = 2 and 3, two seeds

FOLDER holds MNIST/raw, torchvision's layout. Finished runs under benchmarks/results/mnist are not repeated.
"""
from pathlib import Path
from fastcore.script import call_parse
from fastai_jocor.lab.config import RunConfig
from fastai_jocor.lab.grid import run_grid

RESULTS = Path(__file__).resolve().parent/'results'

def protocol():
    "One seed of each, and two more of k = 2 at 0.95"
    return [RunConfig('mnist', k=k, epochs=200, co_lambda=lam, seed=s) for lam,k,s in ((.95,2,0), (.95,2,1), (.95,2,2), (.95,3,0), (.9,2,0), (.9,3,0))]
def several_lambdas():
    return [RunConfig('mnist', k=k, co_lambda=lam, epochs=10, lr=2e-3, schedule='one_cycle', seed=s) for s in (0,1) for k in (3,2) for lam in (.5,.7,.8,.9,.95)]

@call_parse
def main(
    grid:str, # protocol or lambda
    path:str=None, # Folder that holds MNIST/raw
    n_jobs:int=-1 # Runs side by side; -1 for one a core
):
    "Run a grid and write its table"
    df = run_grid(dict(protocol=protocol, **{'lambda': several_lambdas})[grid](), RESULTS/'mnist', path, n_jobs)
    df.to_csv(RESULTS/f'mnist_{grid}.csv', index=False, float_format='%.6g')
    print(df[['name','co_lambda','seed','peer_accuracy','ensemble_accuracy','best_accuracy','label_precision','seconds']].round(4).to_string(index=False))
