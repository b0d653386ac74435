"""Is anything lost when the body is trained on, after heads on its features? Photographs of clothes, 30% wrong labels

    python benchmarks/fine_tune.py --path FOLDER --weights FILE     # all rows that are missing, then the table
    python benchmarks/fine_tune.py --path FOLDER --weights FILE --n 3068 --size 128 --resize crop --heads
    python benchmarks/fine_tune.py --only-table

FOLDER holds `clothing/{train,test}/<class>`; timm fetches the weights of `tf_efficientnet_lite0` if no file is named.
A thousand photographs, squeezed to 96 pixels, are trained on, unless arguments say otherwise. Three heads are trained
on what the frozen body sees, each without a third of the labels, and go back on the body; in the row of 0 epochs with a
new callback, each without a tenth of them, as is usual. Each other row of results/fine_tune.csv goes on from the first,
with the body trained too, for `epochs` epochs at one cycle's largest rates `body_lr` and `head_lr`. `callback` is the
heads' own, which goes on with what it knows of the labels, or a new one. Accuracies are on the test set, of the mean of
the three and of each alone. The body is trained in bfloat16. `averages` says whether batch normalisation keeps the
averages that the body came with.
"""
import os, time, warnings, numpy as np, pandas as pd, torch
from collections import namedtuple
from pathlib import Path
from fastcore.script import call_parse
from fastai.basics import *
from fastai.vision.all import ChannelsLast
from fastai_jocor.all import AutocastBF16, JoCorCallback
from fastai_jocor.judge import fit_heads, KeepAverages, NoValidation, peer_log_probs
from fastai_jocor.feature_loaders import feature_dls, given_labels as labels_of
from fastai_jocor.heads import feature_learner
from fastai_jocor.copies import copied
import everyday_data
from everyday_data import _some, clothing_photos, given_labels, photo_learner

FILE = Path(__file__).resolve().parent/'results'/'fine_tune.csv'
Way = namedtuple('Way', 'epochs body_lr head_lr callback averages', defaults=['heads','kept'])
ways = [Way(0, 0., 0.), Way(0, 0., 0., 'new'), Way(1, 1e-5, 1e-4), Way(1, 1e-5, 1e-4, averages='moved'),
        Way(1, 1e-4, 1e-4), Way(1, 1e-5, 1e-3, 'new')]
KEY = [*Way._fields,'seed','items','noise','size','resize']

def accuracies(learn):
    "Of the mean of the peers, and the mean of the peers' own"
    said,y = peer_log_probs(learn, learn.dls.valid),labels_of(learn.dls.valid)
    return float((np.exp(said).mean(0).argmax(-1) == y).mean()),float((said.argmax(-1) == y).mean())

def train_heads(learn, way, seed, folder):
    "Heads as in an audit, or as for use where only these are trained, by a new callback"
    if way.epochs or way.callback == 'heads': return fit_heads(learn, seed=seed, folder=folder, progress=False)
    dls = feature_dls(learn, folder, seed=seed, progress=False)
    set_seed(seed)
    heads,cb = feature_learner(learn, dls),JoCorCallback(k=3, seed=seed)
    with heads.no_bar(), heads.no_logging(): heads.fit_one_cycle(15, 3e-3, cbs=[cb, NoValidation()])
    return heads,cb

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
    noise:str='symmetric 30', # Kind of noise, and its rate in percent
    size:int=96, # Side to which photographs are brought, in pixels
    resize:str='squish', # `squish` or `crop`, as in fastai's `Resize`
    heads:bool=False, # Only train the heads
    only_table:bool=False # Print what is there, and run nothing
):
    "Make the rows that are not there yet, and print them"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    done = {tuple(o) for o in rows()[KEY].itertuples(index=False)}
    own = dict(seed=seed, items=n, noise=noise, size=size, resize=resize)
    todo = [] if only_table else [o for o in ways if (*o, *own.values()) not in done]
    if heads: todo = [o for o in todo if not o.epochs]
    if todo:
        if weights: everyday_data.WEIGHTS = weights
        d = _some(clothing_photos(Path(path), seed), n, seed)
        y = given_labels(d, 'clothing_photos', noise, seed)
        set_seed(seed)
        learn = photo_learner(d, y, 64, size, resize)
    for way in todo:
        start = time.time()
        trained,cb = train_heads(learn, way, seed, folder)
        whole = tuned(learn, trained, cb, way, seed) if way.epochs else on_body(learn, trained)
        both,one = accuracies(whole)
        add(way._asdict() | own | dict(accuracy=both, peer_accuracy=one, seconds=time.time()-start))
    print(rows().to_string(index=False))
