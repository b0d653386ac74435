"""Is anything lost when the body is trained on, after heads on its features? Photographs of clothes, 30% wrong labels

    python benchmarks/fine_tune.py --path FOLDER --weights FILE     # all rows that are missing, then the table
    python benchmarks/fine_tune.py --only-table

FOLDER holds `clothing/{train,test}/<class>`; timm fetches the weights of `tf_efficientnet_lite0` if no file is named.
A thousand photographs are trained on, unless `--n` says otherwise. Three heads are trained on what the frozen body
sees, each without a third of the labels, and go back on the body. Each other row of results/fine_tune.csv goes on from
there, with the body trained too, for `epochs` epochs at one cycle's largest rates `body_lr` and `head_lr`. `callback`
is the heads' own, which goes on with what it knows of the labels, or a new one. Accuracies are on the test set, of the
mean of the three and of each alone. The body is trained in bfloat16. `averages` says whether batch normalisation keeps
the averages that the body came with.
"""
import os, time, warnings, numpy as np, pandas as pd, torch
from collections import namedtuple
from pathlib import Path
from fastcore.script import call_parse
from fastai.basics import *
from fastai.vision.all import ChannelsLast
from fastai_jocor.all import AutocastBF16, JoCorCallback
from fastai_jocor.judge import fit_heads, KeepAverages, NoValidation, peer_log_probs
from fastai_jocor.features import given_labels as labels_of
from fastai_jocor.peers import copied
import everyday_data
from everyday_data import _some, clothing_photos, given_labels, photo_learner

FILE = Path(__file__).resolve().parent/'results'/'fine_tune.csv'
Way = namedtuple('Way', 'epochs body_lr head_lr callback averages', defaults=['heads','kept'])
ways = [Way(0, 0., 0.), Way(1, 1e-5, 1e-4), Way(1, 1e-5, 1e-4, averages='moved'), Way(1, 1e-4, 1e-4),
        Way(1, 1e-5, 1e-3, 'new')]
KEY = [*Way._fields,'seed','items']

def accuracies(learn):
    "Of the mean of the peers, and the mean of the peers' own"
    said,y = peer_log_probs(learn, learn.dls.valid),labels_of(learn.dls.valid)
    return float((np.exp(said).mean(0).argmax(-1) == y).mean()),float((said.argmax(-1) == y).mean())

def on_body(learn, heads):
    "A copy of the learner with the heads on its body, all of it free to be trained"
    whole = Learner(learn.dls, copied(learn.model), loss_func=learn.loss_func, splitter=learn.splitter)
    whole.take_heads(heads).unfreeze()
    return whole

def tuned(learn, heads, state, way, seed):
    "Train body and heads on"
    set_seed(seed)
    whole = on_body(learn, heads)
    cb = JoCorCallback(k=3, hidden=1/3, seed=seed, rule='evidence')
    if way.callback == 'heads': cb = state
    cbs = [cb, NoValidation(), ChannelsLast(), AutocastBF16(), *[KeepAverages()]*(way.averages == 'kept')]
    with whole.no_bar(), whole.no_logging():
        whole.fit_one_cycle(way.epochs, slice(way.body_lr, way.head_lr), cbs=cbs)
    return whole

def rows(): return pd.read_csv(FILE) if FILE.exists() else pd.DataFrame(columns=KEY)

def add(row):
    print({k: round(v, 4) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    pd.DataFrame([row]).to_csv(FILE, mode='a', header=not FILE.exists(), index=False, float_format='%.5g')

@call_parse
def main(
    path:str=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    weights:str=None, # File of the body's weights
    folder:str=None, # Folder for the features; default: `features` in the working folder
    n:int=1000, # Photographs to train on, at most
    seed:int=0, # Of the noise, the weights and the batches
    only_table:bool=False # Print what is there, and run nothing
):
    "Make the rows that are not there yet, and print them"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    done = {tuple(o) for o in rows()[KEY].itertuples(index=False)}
    todo = [] if only_table else [o for o in ways if (*o, seed, n) not in done]
    if todo:
        if weights: everyday_data.WEIGHTS = weights
        d = _some(clothing_photos(Path(path), seed), n, seed)
        y = given_labels(d, 'clothing_photos', 'symmetric 30', seed)
        set_seed(seed)
        learn = photo_learner(d, y, 64)
    for way in todo:
        start = time.time()
        heads,cb = fit_heads(learn, seed=seed, folder=folder, progress=False)
        whole = tuned(learn, heads, cb, way, seed) if way.epochs else on_body(learn, heads)
        both,one = accuracies(whole)
        add(dict(way._asdict(), seed=seed, items=len(y), accuracy=both, peer_accuracy=one, seconds=time.time()-start))
    print(rows().to_string(index=False))
