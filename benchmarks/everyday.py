"""Everyday use: does the one line `JoCorCallback(k=3)` ever make an ordinary learner worse?

    python benchmarks/everyday.py --path FOLDER --only plain,jocor3      # a quarter of an hour on one core
    python benchmarks/everyday.py --path FOLDER                          # the fast part, seed 0
    python benchmarks/everyday.py --path FOLDER --seeds 0-2 --part all
    python benchmarks/everyday.py --path FOLDER --data digits,clothing --only plain,default
    python benchmarks/everyday.py --part ablation                       # without each part of the default
    python benchmarks/everyday.py --take results/gpu/everyday.csv       # rows that another machine has made
    python benchmarks/everyday.py --summary-only

FOLDER, or the environment variable FASTAI_JOCOR_DATA, holds the data. Data that are not there are left out, and named:

- `cifar10_features.npz`, `clothing_features.npz`: what a pretrained body sees, as arrays `x_train`, `y_train`, `x_test`
  and `y_test`; CIFAR-10's also with the labels that people gave: `aggre_label`, `random_label1`, `worse_label`;
- `MNIST/raw`, `adult/adult.csv.gz`, `trec/train_5500.label` and `trec/TREC_10.label`;
- `cifar10/{train,test}/<class>` and `clothing/{train,test}/<class>`, photographs for the slow part, and
  `CIFAR-10_human.pt`, the labels that people gave. A GPU does it in minutes: `gpu.py everyday`.

The slow part also fine-tunes a pretrained EfficientNet-Lite0, and trains it whole in a plain `Learner`. timm fetches
its weights, unless the environment variable FASTAI_JOCOR_WEIGHTS names a file of them, in timm's layout for
`tf_efficientnet_lite0`.

Each row of results/everyday.csv is one run: a cell (data, noise, epochs, learning rate), a method and a seed. Rows that
are there are not run again. The learners are ordinary fastai learners. Their labels are corrupted before they see them,
so that no callback can look up the truth: where τ is not given, it has to be estimated. `averaged` is the mean
probability of three plain networks. `no_look`, which runs where `--only` names it, is the default without its first
look at the labels, which makes a difference only where a pretrained body is trained (*clothing_photos*,
*clothing_timm*, *cifar3k*).
"""
import os, time, warnings, numpy as np, pandas as pd, torch
from collections import namedtuple
from pathlib import Path
from fastcore.script import call_parse
from fastai.basics import *
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai_jocor.all import JoCorCallback
from fastai_jocor.evidence import Evidence
from everyday_data import *

FILE = Path(__file__).resolve().parent/'results'/'everyday.csv'
KEY = ['data', 'noise', 'epochs', 'lr', 'method', 'seed']

def one_cycle(learn, epochs, lr, cbs): learn.fit_one_cycle(epochs, lr, cbs=cbs)
def fine_tuned(learn, epochs, lr, cbs): learn.fine_tune(epochs, lr, freeze_epochs=2, cbs=cbs)

# The cells
Data = namedtuple('Data', 'source learner bs noises schedules part fit', defaults=['fast', one_cycle])
quick_photo_learner = partial(photo_learner, opt_func=fastais_adam)
simple = 'clean', 'symmetric 50', 'asymmetric 40'
light = 'clean', 'symmetric 30', 'asymmetric 30'
hard_noises = 'clean', 'symmetric 30', 'asymmetric 40'
people = 'clean', 'aggre', 'random', 'worse', 'symmetric 50', 'asymmetric 40'
many = 'clean', 'symmetric 20', 'symmetric 50', 'symmetric 80', 'asymmetric 40', 'instance 40'
three = (15, 3e-3), (15, 1e-2), (60, 2e-2)
tables = dict(
    digits=Data(digits, image_learner, 64, many, three),
    rare=Data(rare, image_learner, 64, ['clean'], three),
    scarce=Data(scarce, image_learner, 64, ['clean','symmetric 20'], three),
    clothing=Data(clothing, feature_learner, 64, light, [(15, 3e-3)]),
    features5k=Data(features5k, feature_learner, 64, people, [(10, 3e-3), (30, 3e-3)]),
    features500=Data(features500, feature_learner, 64, light, [(30, 3e-3)]),
    features1k=Data(features1k, feature_learner, 64, light, [(30, 3e-3)]),
    hard3k=Data(hard3k, feature_learner, 64, hard_noises, [(10, 3e-3), (30, 3e-3)]),
    hard10k=Data(hard10k, feature_learner, 64, hard_noises, [(10, 3e-3), (30, 3e-3)]),
    clothing500=Data(clothing500, feature_learner, 64, light, [(15, 3e-3)]),
    trec=Data(trec, text_learner, 64, light, [(10, 1e-2)]),
    adult=Data(adult, table_learner, 256, light, [(5, 1e-2)]),
    mnist=Data(mnist, image_learner, 128, simple, [(10, 3e-3)]),
    features=Data(features, feature_learner, 128, people, [(10, 3e-3)]),
    features30=Data(features, feature_learner, 128, people, [(30, 3e-3)], 'slow'),
    cifar=Data(cifar, image_learner, 128, [*simple, 'worse'], [(10, 3e-3), (30, 3e-3)], 'slow'),
    clothing_photos=Data(clothing_photos, quick_photo_learner, 64, light, [(4, 2e-3)], 'slow', fine_tuned),
    clothing_timm=Data(clothing_timm, timm_learner, 64, ['clean','symmetric 30'], [(4, 1e-3)], 'slow'),
    cifar3k=Data(cifar3k, quick_photo_learner, 64, ['worse'], [(4, 2e-3)], 'slow', fine_tuned))
Cell = namedtuple('Cell', 'data noise epochs lr')

# The methods: how many networks, which loss, which callback from the true noise rate, and whether on right labels only
Method = namedtuple('Method', 'nets loss callback right', defaults=[1, None, None, False])
methods = dict(
    plain=Method(),
    smooth=Method(loss=partial(LabelSmoothingCrossEntropyFlat, eps=.1)),
    averaged=Method(nets=3),
    jocor3=Method(callback=lambda tau: JoCorCallback(k=3)),
    jocor2=Method(callback=lambda tau: JoCorCallback(k=2)),
    jocor3_tau=Method(callback=lambda tau: JoCorCallback(k=3, forget_rate=tau)),
    jocor2_tau=Method(callback=lambda tau: JoCorCallback(k=2, forget_rate=tau)),
    schedule=Method(callback=lambda tau: JoCorCallback(k=3, rule='schedule', rounding='official')),
    by_hand=Method(callback=lambda tau: JoCorCallback(k=3, forget_rate=tau, balance=1)),
    no_look=Method(callback=lambda tau: JoCorCallback(k=3, without=('look',))))

# The parts of the default, each switched off: some cells where something is at stake
ablation = {f'no_{part}': Method(callback=lambda tau, part=part: JoCorCallback(k=3, without=(part,)))
            for part in Evidence.parts}
at_stake = [Cell('digits', 'symmetric 50', 15, 3e-3), Cell('digits', 'symmetric 50', 60, 2e-2),
            Cell('digits', 'symmetric 80', 60, 2e-2), Cell('digits', 'asymmetric 40', 15, 3e-3),
            Cell('digits', 'instance 40', 15, 3e-3), Cell('rare', 'clean', 15, 3e-3),
            Cell('clothing', 'clean', 15, 3e-3), Cell('clothing', 'symmetric 30', 15, 3e-3),
            Cell('hard3k', 'clean', 30, 3e-3), Cell('hard10k', 'clean', 30, 3e-3),
            Cell('features5k', 'asymmetric 40', 10, 3e-3), Cell('features5k', 'worse', 10, 3e-3),
            Cell('adult', 'symmetric 30', 5, 1e-2)]

class LastEpoch(Callback):
    "Note how often each item was kept before the last epoch"
    order = -6
    def __init__(self, cb): self.cb,self.before = cb,None
    def before_train(self):
        if self.epoch == self.n_epoch-1: self.before = self.cb.items.kept.clone()
    def before_validate(self): raise CancelValidException()
    def precision(self, right):
        "Share of right labels among those kept in the last epoch"
        kept = (self.cb.items.kept-self.before).double().cpu()
        return float(kept[right].sum()/kept.sum())

class NoValidation(Callback):
    "Spend no time on the test set before the end"
    def before_validate(self): raise CancelValidException()

@torch.no_grad()
def probabilities(learn):
    "Probabilities that each network gives the test items, shape (networks, items, classes), and the items' classes"
    model = learn.model.eval()
    nets = [model.peer(i) for i in range(model.k)] if hasattr(model, 'peer') else [model]
    batches = list(learn.dls.valid)
    outs = [[net(*b[:-1]).as_subclass(torch.Tensor).softmax(-1) for b in batches] for net in nets]
    truth = torch.cat([b[-1].as_subclass(torch.Tensor).flatten().long() for b in batches])
    return torch.stack([torch.cat(o) for o in outs]),truth

def train(d, y, cell, method, tau, seed):
    "Train one learner; gives its networks' probabilities, the test items' classes, and its callbacks"
    set_seed(seed)
    table = tables[cell.data]
    loss = {} if method.loss is None else dict(loss_func=method.loss())
    learn = table.learner(d, y, table.bs, **loss)
    cb = None if method.callback is None else method.callback(tau)
    watch = NoValidation() if cb is None else LastEpoch(cb)
    with learn.no_bar(), learn.no_logging(): table.fit(learn, cell.epochs, cell.lr, L(cb, watch).filter())
    return *probabilities(learn),cb,watch

def right_items(d, y, cell):
    "The items of an array whose label is right, and so many epochs that there are as many steps"
    at = np.flatnonzero(y == d.y)
    return d._replace(x=d.x[at], y=d.y[at]),y[at],cell._replace(epochs=round(cell.epochs*len(y)/len(at)))

def machine():
    if default_device().type == 'cuda': return torch.cuda.get_device_name()
    return f'{os.cpu_count()} cores, {torch.get_num_threads()} used'

def run(cell, name, seed, path):
    "One row: a cell, a method, a seed"
    method,d,start = (methods | ablation)[name],tables[cell.data].source(path, seed),time.time()
    y = given_labels(d, cell.data, cell.noise, seed)
    right = torch.as_tensor(y == d.y)
    wrong = float((~right).double().mean())
    shown = right_items(d, y, cell) if method.right else (d, y, cell)
    trained = [train(*shown, method, wrong, 100*i+seed) for i in range(method.nets)]
    probs = torch.cat([o[0] for o in trained])
    _,truth,cb,watch = trained[-1]
    hit = probs.mean(0).argmax(-1) == truth
    row = dict(cell._asdict(), method=name, seed=seed, accuracy=float(hit.double().mean()))
    row['peer_accuracy'] = float((probs.argmax(-1) == truth).double().mean())
    row['worst_recall'] = min(float(hit[truth == c].double().mean()) for c in truth.unique())
    estimate = None if cb is None else cb.estimate
    row['precision'] = np.nan if cb is None else watch.precision(right)
    interval = dict(estimate='rate', low='low', high='high')
    row |= {name: np.nan if estimate is None else getattr(estimate, o) for name,o in interval.items()}
    return dict(row, wrong=wrong, seconds=time.time()-start, machine=machine())

def cells(part, only):
    "All cells of a part and of some data"
    for name,t in tables.items():
        if name not in only or part not in ('all', t.part): continue
        for epochs,lr in t.schedules:
            for noise in t.noises: yield Cell(name, noise, epochs, lr)

def rows(file=FILE): return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEY)

def do_run(key, path, file=FILE):
    "Run one row, print it, and add it to a file; a folder without the data is named"
    *cell,name,seed = key
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: row = run(Cell(*cell), name, seed, path)
        except FileNotFoundError as e: return print(f'{cell[0]} is left out: {e}', flush=True)
    print({k: round(v, 4) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    add_row(row, file)

def add_row(row, file):
    file.parent.mkdir(exist_ok=True)
    pd.DataFrame([row]).to_csv(file, mode='a', header=not file.exists(), index=False, float_format='%.5g')

def take_rows(new, file=FILE):
    "Add the rows of another file, in place of those of the same cell, method and seed, in the order of the cells"
    both = pd.concat([rows(file), rows(new)]).drop_duplicates(KEY, keep='last')
    places = {c: i for i,c in enumerate(cells('all', tables))}
    place = [places.get(Cell(*o), len(places)) for o in both[KEY[:4]].itertuples(index=False)]
    both.iloc[np.argsort(place, kind='stable')].to_csv(file, index=False, float_format='%.5g')

def summary(df):
    "Mean accuracy in per cent by cell and method, and how far each is from plain"
    cell = KEY[:4]
    seeds = df.groupby(cell).seed.nunique().rename('seeds')
    mean = 100*df.pivot_table(index=cell, columns='method', values='accuracy', sort=False)
    worst = 100*df.pivot_table(index=cell, columns='method', values='worst_recall', sort=False)
    spread = 100*df[df.method == 'plain'].groupby(cell).accuracy.std().rename('±')
    gain = mean.sub(mean['plain'], axis=0).drop(columns='plain').add_prefix('Δ ')
    fall = worst.sub(worst['plain'], axis=0).drop(columns='plain').add_prefix('Δ recall ')
    return pd.concat([mean, spread, gain, fall], axis=1).join(seeds).round(1)

@call_parse
def main(
    path:str=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    part:str='fast', # `fast`, `slow`, `all`, or `ablation`: the default without each of its parts
    seeds:str='0', # Seeds, as a range or one
    data:str=','.join(tables), # Which data
    only:str=','.join(o for o in methods if o != 'no_look'), # Which methods
    take:Path=None, # Take the rows of this file, and run nothing
    summary_only:bool=False # Print the table of what is there, and run nothing
):
    "Do the runs that are not done yet, and print the table"
    torch.set_flush_denormal(True)
    path = Path(path)
    a,*b = map(int, seeds.split('-'))
    seeds = range(a, (b or [a])[0]+1)
    which = at_stake if part == 'ablation' else list(cells(part, data.split(',')))
    names = list(ablation) if part == 'ablation' else only.split(',')
    todo = [(*c, m, s) for s in seeds for c in which for m in names]
    done = {tuple(o) for o in rows()[KEY].itertuples(index=False)}
    if take: take_rows(take)
    for key in [] if summary_only or take else todo:
        if key not in done: do_run(key, path)
    print(summary(rows()).to_string())
