"""How well `JoCorCallback(k=3)` estimates the noise rate in its warm-up, when nobody tells it.

    python benchmarks/noise_rate.py --path FOLDER              # all
    python benchmarks/noise_rate.py --path FOLDER --data cifar # only these rows

FOLDER holds MNIST/raw, cifar10/train, cifar10/test and CIFAR-10_human.pt. A run of 10 one-cycle epochs is stopped when
the rate is estimated: after three epochs, or five where the estimate after three or four is not to be trusted. Nothing
is dropped before. MNIST: all 60,000 items, the papers' perceptron, three seeds. CIFAR-10N: 3,000 images, the papers'
7-layer network in bfloat16, one seed; it has hardly learned the classes by then. Writes results/noise_rate.csv.
"""
import warnings, pandas as pd, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import Callback, CancelFitException, ChannelsLast, Learner, ProgressCallback, noop, set_seed
from fastai_jocor.all import *
from fastai_jocor.lab.run import fast_adam
from audit import NOISES

RESULTS = Path(__file__).resolve().parent/'results'

class StopWhenKnown(Callback):
    "End the fit once the noise rate is estimated"
    order = 90
    def after_epoch(self):
        if self.learn.jo_cor.estimate is not None: raise CancelFitException()

def run(data, noise, seed, path):
    path = Path(path)
    if data == 'cifar':
        human = HumanLabels(path/'CIFAR-10_human.pt', noise)
        dls = cifar10_dls(path/'cifar10', human, seed, subset=3000, progress=False)
    else: dls = mnist_dls(path, Asymmetric(.4, 'mnist') if noise.startswith('asym') else noise, seed)
    set_seed(seed)
    learn = Learner(dls, jocor_mlp() if data == 'mnist' else jocor_cnn(), opt_func=fast_adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    cb = JoCorCallback(k=3, forget_rate='auto', rule='schedule')
    cbs = [cb, StopWhenKnown()]
    if data == 'cifar': cbs += [ChannelsLast(), AutocastBF16()]
    learn.fit_one_cycle(10, 2e-3, cbs=cbs)
    f,rec,est = cb.ledger,dls.noise,cb.estimate
    figures = dict(accuracy_of_votes=float((f.predicted_label == f.true_label).mean()), true_rate=rec.rate,
                   estimate=est.rate, error=abs(est.rate-rec.rate), joint=est.joint, votes=est.votes, doubt=est.doubt)
    figures = {name: round(o, 4) for name,o in figures.items()}
    transition_error = round(float(abs(cb.transition()-rec.matrix).mean()), 4)
    return dict(data=data, noise=noise, seed=seed, items=len(f), epochs=len(cb.history), **figures,
                trusted=est.trusted, transition_error=transition_error)

@call_parse
def main(
    path:str=None, # Folder of the data
    seeds:int=3, # Seeds for MNIST
    data:str='mnist cifar' # Which data to do; the rows of others stay as they are in the file
):
    "Estimate, print, and write after each row"
    torch.set_num_threads(1)
    file = RESULTS/'noise_rate.csv'
    todo = [('mnist', n, s) for n in NOISES['mnist'] for s in range(seeds)]
    todo += [('cifar', n, 0) for n in ('aggre','random1','worse')]
    old = pd.read_csv(file).to_dict('records') if file.exists() else []
    rows = {(r['data'], r['noise'], r['seed']): r for r in old}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*cannot be told.*')
        for key in todo:
            if key[0] not in data.split(): continue
            rows[key] = run(*key, path)
            print(rows[key], flush=True)
            pd.DataFrame(list(rows.values())).to_csv(file, index=False)
