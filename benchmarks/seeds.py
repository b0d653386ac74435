"""Two networks, three or five? The papers' claims over ten seeds, with a λ that is tuned for each method

    python benchmarks/seeds.py --path FOLDER                      # all rows that are missing
    python benchmarks/seeds.py --path FOLDER --parts main,default --seeds 0-4
    python benchmarks/seeds.py --path FOLDER --noises worse

FOLDER, or the environment variable FASTAI_JOCOR_DATA, holds `cifar10_features.npz`: CIFAR-10 as a pretrained
EfficientNet-Lite0 sees it, with the labels that people gave. The papers' perceptron is trained on 10,000 items, others
for each seed, or on all 50,000, for ten one-cycle epochs of batches of 128. The published rule is told the share of
wrong labels; of asymmetric noise, this is half the rate. Plain networks are trained side by side on the same batches,
without selection or contrast. Each row of results/seeds.csv is a method and a seed:

    peers, ensemble               accuracy of the single networks (mean) and of their mean probability, all test items
    peers_curve, ensemble_curve   the same after each epoch, in per cent, on every fifth test item

λ is tuned on 10,000 items and seeds that are not scored, 100 and 101, by the accuracy of the ensemble. The parts:

    main       plain networks; one, two and three peers with all pairs and three in a circle, each with its own λ
    default    one, two and three peers by the default rule, which is told nothing
    strength   three peers at the λ of two, and at the same weight of the plain sum; two at the λ of three
    ce         contrasts by cross-entropy
    co         Co-teaching and Co-teaching+
    five       five peers, all pairs
    ring       five peers in a circle
    all        the methods of `main` and five peers on 50,000 items

By the published rule, up to twelve runs of a method are trained as one stack (seeds_stack.py). Rows that are there are
not made again. Matrix products are in bfloat16 where the processor has it.
"""
import os, warnings, numpy as np, pandas as pd, torch
from collections import namedtuple
from functools import lru_cache
from pathlib import Path
from fastcore.basics import chunked
from fastcore.script import call_parse
from fastai_jocor.all import JoCorCallback, plain_lambda
from everyday_data import features, features10k, given_labels
from seeds_stack import CoTeachingByRun, CoTeachingPlusByRun, JoCorByRun, Run, train

FILE = Path(__file__).resolve().parent/'results'/'seeds.csv'
KEY = ['data','noise','method','k','contrast','co_lambda','seed']
noises = ['worse','symmetric 50','asymmetric 40','aggre','instance 40','symmetric 20','symmetric 80','random']
sources = dict(features10k=features10k, features=features)
tuning,lambdas = [100,101],[1/2,2/3,.8,8/9,16/17,32/33] # the contrast counts 1, 2, … 32 times as much as the fit
numbers = [1,2,3]               # of plain networks

Job = namedtuple('Job', 'data noise method k contrast', defaults=[''])
def jocor(k, contrast='kl'): return 'jocor',k,contrast
two,three,circle,five,circle5 = jocor(2),jocor(3),jocor(3, 'kl_circular'),jocor(5),jocor(5, 'kl_circular')
ce = [jocor(2, 'ce'),jocor(3, 'ce'),jocor(3, 'ce_circular')]

def callback(job, runs):
    "The method of a job; plain networks are peers without selection and contrast"
    if job.method == 'default': return JoCorCallback(job.k)
    kwargs = dict(k=job.k, rounding='official')
    if job.method == 'co_teaching': cb = CoTeachingByRun(**kwargs)
    elif job.method == 'co_teaching_plus': cb = CoTeachingPlusByRun(**kwargs)
    else: cb = JoCorByRun(contrast=job.contrast or 'kl', rule='schedule', **kwargs)
    return cb.set_runs([o._replace(tau=0.) for o in runs] if job.method == 'plain' else runs)

@lru_cache(12)
def data_of(data, seed, path): return sources[data](path, seed)

def run_of(job, co_lambda, seed, path):
    "What a run trains on; it is told the share of wrong labels"
    d = data_of(job.data, seed, path)
    y = given_labels(d, job.data, job.noise, seed)
    return Run(d, y, seed, co_lambda, float(np.mean(y != d.y)))

def text(curve): return ' '.join(f'{100*o:.2f}' for o in curve.tolist())

def train_rows(job, pairs, path):
    "The rows of a method for pairs of λ and seed; for plain networks, one for each number of them"
    runs = [run_of(job, *o, path) for o in pairs]
    counts = numbers if job.method == 'plain' else [job.k]
    curves,end = train(runs, callback(job, runs), counts)
    for i,r in enumerate(runs):
        for j,k in enumerate(counts):
            row = dict(job._replace(k=k)._asdict(), co_lambda=r.co_lambda, seed=r.seed, tau=r.tau)
            row |= dict(zip(('peers','ensemble'), end[i,j].tolist()))
            yield row | dict(peers_curve=text(curves[:,i,j,0]), ensemble_curve=text(curves[:,i,j,1]))

def rows(): return pd.read_csv(FILE, keep_default_na=False) if FILE.exists() else pd.DataFrame(columns=KEY)

def key(job, lam, seed): return *job,f'{lam:.4f}',seed

def missing(job, pairs):
    "The pairs of λ and seed that the file does not have"
    have = {key(o[:-2], *o[-2:]) for o in rows()[KEY].itertuples(index=False, name=None)}
    return [o for o in pairs if key(job, *o) not in have]

def do(job, lambdas, seeds, path):
    "Train what is missing, and add it to the file"
    pairs = missing(job, [(lam, s) for lam in lambdas for s in seeds])
    # each run of the default by itself: it finds the share of wrong labels from all items that it is given
    for part in chunked(pairs, 1 if job.method == 'default' else 12):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            df = pd.DataFrame(train_rows(job, part, path))
        FILE.parent.mkdir(exist_ok=True)
        df.to_csv(FILE, mode='a', header=not FILE.exists(), index=False, float_format='%.5g')
        found = (100*df.groupby(['k','co_lambda']).ensemble.mean()).round(2)
        print(*job, f'{len(part)} runs:', *found, flush=True)

def best_lambda(df, job):
    "The λ with the best ensemble on the seeds that are not scored"
    same = (df[list(Job._fields)] == list(job)).all(axis=1) & df.seed.isin(tuning)
    best = df[same].groupby('co_lambda').ensemble.mean().idxmax()
    return min(lambdas, key=lambda o: abs(o-best))

def tuned(noise, method, path):
    "The λ of a method, found on 10,000 items"
    job = Job('features10k', noise, *method)
    do(job, lambdas, tuning, path)
    return best_lambda(rows(), job)

def jobs(part, data, noise, path):
    "The jobs of a part on one kind of noise, with their λ"
    own = lambda m: (Job(data, noise, *m), [tuned(noise, m, path)])
    untold = lambda name, *ks: ((Job(data, noise, name, k), [0.]) for k in ks)
    if part in ('main','all'):
        yield from untold('plain', max(numbers))
        yield Job(data, noise, *jocor(1)), [0.]
        yield from map(own, (two, three, circle))
    if part == 'default': yield from untold('default', 3, 2, 1)
    if part == 'strength':
        lam = tuned(noise, two, path)
        yield Job(data, noise, *three), [lam, plain_lambda(lam, 3)]
        yield Job(data, noise, *circle), [lam]
        yield Job(data, noise, *two), [tuned(noise, three, path)]
    if part in ('five','all'): yield own(five)
    if part == 'ring': yield own(circle5)
    if part == 'co':
        for name in ('co_teaching','co_teaching_plus'): yield from untold(name, 2)
    if part == 'ce': yield from map(own, ce)

parts = ['main','default','strength','ce','co','five','ring','all']

@call_parse
def main(
    path:str=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    parts:str=','.join(parts), # Which parts, in order
    seeds:str='0-9', # Scored seeds, as a range
    noises:str=','.join(noises) # Which kinds of noise
):
    "Make the rows that are missing"
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision('medium')
    a,b = map(int, seeds.split('-'))
    for part in parts.split(','):
        data = 'features' if part == 'all' else 'features10k'
        for noise in noises.split(','):
            for job,lams in jobs(part, data, noise, Path(path)): do(job, lams, range(a, b+1), Path(path))
