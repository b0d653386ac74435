"""How well `JoCorCallback(k=3)` estimates the noise rate in its warm-up, when nobody tells it.

    python benchmarks/noise_rate.py --path FOLDER              # all
    python benchmarks/noise_rate.py --path FOLDER --data cifar # only these rows

FOLDER holds MNIST/raw, cifar10/train, cifar10/test and CIFAR-10_human.pt. The first epochs of a run of 10 one-cycle epochs, in which nothing is
dropped: three, or five where the estimate after three or four is not to be trusted. MNIST: all 60,000 items, the papers' perceptron, three seeds.
CIFAR-10N: 3,000 images, the papers' 7-layer network in bfloat16, one seed; it has hardly learned the classes by then. Writes results/noise_rate.csv.
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
    if data == 'mnist': dls = mnist_dls(path, Asymmetric(.4, 'mnist') if noise.startswith('asym') else noise, seed)
    else: dls = cifar10_dls(path/'cifar10', HumanLabels(path/'CIFAR-10_human.pt', noise), seed, subset=3000, progress=False)
    set_seed(seed)
    learn = Learner(dls, jocor_mlp() if data == 'mnist' else jocor_cnn(), opt_func=fast_adam)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    cb = JoCorCallback(k=3, forget_rate='auto')
    learn.fit_one_cycle(10, 2e-3, cbs=[cb, StopWhenKnown()] + ([ChannelsLast(), AutocastBF16()] if data == 'cifar' else []))
    f,rec,est = cb.ledger,dls.noise,cb.estimate
    T = abs(cb.transition()-rec.matrix)
    return dict(data=data, noise=noise, seed=seed, items=len(f), epochs=len(cb.history), accuracy_of_votes=round(float((f.predicted_label == f.true_label).mean()), 4), true_rate=round(rec.rate, 4), estimate=round(est.rate, 4), error=round(abs(est.rate-rec.rate), 4),
                joint=round(est.joint, 4), votes=round(est.votes, 4), doubt=round(est.doubt, 4), trusted=est.trusted, transition_error=round(float(T.mean()), 4))

@call_parse
def main(
    path:str=None, # Folder of the data
    seeds:int=3, # Seeds for MNIST
    data:str='mnist cifar' # Which data to do; the rows of others stay as they are in the file
):
    "Estimate, print, and write after each row"
    torch.set_num_threads(1)
    file,todo = RESULTS/'noise_rate.csv',[('mnist',n,s) for n in NOISES['mnist'] for s in range(seeds)] + [('cifar',n,0) for n in ('aggre','random1','worse')]
    rows = {(r['data'], r['noise'], r['seed']): r for r in pd.read_csv(file).to_dict('records')} if file.exists() else {}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*cannot be told.*')
        for key in todo:
            if key[0] not in data.split(): continue
            rows[key] = run(*key, path)
            print(rows[key], flush=True)
            pd.DataFrame(list(rows.values())).to_csv(file, index=False)
