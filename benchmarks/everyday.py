"""Everyday use: does the one line `JoCorCallback(k=3)` ever make an ordinary learner worse?

    python benchmarks/everyday.py --path FOLDER                          # the fast part, seed 0
    python benchmarks/everyday.py --path FOLDER --seeds 0-2 --part all
    python benchmarks/everyday.py --path FOLDER --data digits,clothing --only plain,default
    python benchmarks/everyday.py --part ablation                       # without each part of the default
    python benchmarks/everyday.py --summary_only

FOLDER, or the environment variable FASTAI_JOCOR_DATA, holds the data. Data that are not there are left out, and named:

- `cifar10_features.npz`, `clothing_features.npz`: what a pretrained body sees, as arrays `x_train`, `y_train`, `x_test`
  and `y_test`; CIFAR-10's also with the labels that people gave: `aggre_label`, `random_label1`, `worse_label`;
- `MNIST/raw`, `adult/adult.csv.gz`, `trec/train_5500.label` and `trec/TREC_10.label`;
- `cifar10/{train,test}/<class>` and `clothing/{train,test}/<class>`, photographs for the slow part.

The slow part also fine-tunes a pretrained EfficientNet-Lite0. timm fetches its weights, unless `--weights` or the
environment variable FASTAI_JOCOR_WEIGHTS names a file of them, in timm's layout for `tf_efficientnet_lite0`.

Each row of results/everyday.csv is one run: a cell (data, noise, epochs, learning rate), a method and a seed. Rows that
are there are not run again. The learners are ordinary fastai learners. Their labels are corrupted before they see them,
so that no callback can look up the truth: where τ is not given, it has to be estimated. `averaged` is the mean
probability of three plain networks.
"""
import os, time, warnings, numpy as np, pandas as pd, torch
from collections import namedtuple
from functools import lru_cache
from pathlib import Path
from fastcore.script import call_parse
from fastai.tabular.all import *
from fastai.text.all import TextBlock, pad_input
from fastai.vision.all import CategoryBlock, ChannelsLast, ColReader, ColSplitter, DataBlock, ImageBlock
from fastai.vision.all import get_image_files, IndexSplitter, Resize, ResizeMethod, vision_learner
from torch.utils.data import TensorDataset
from fastai_jocor.all import Asymmetric, InMemoryDataLoaders, InstanceDependent, JoCorCallback, Symmetric
from fastai_jocor.all import jocor_cnn, jocor_mlp, mnist_dls
from fastai_jocor.evidence import Evidence

FILE = Path(__file__).resolve().parent/'results'/'everyday.csv'
KEY = ['data', 'noise', 'epochs', 'lr', 'method', 'seed']

# The data: arrays of inputs and true labels; `human` holds label sets that people gave to the training items
Source = namedtuple('Source', 'x y x_test y_test names human')

def _numbers(n): return [str(i) for i in range(n)]

def digits(path, seed):
    "scikit-learn's digits, 1,257 for training"
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    d = load_digits()
    x = (d.images*15).astype(np.uint8)
    x,x_test,y,y_test = train_test_split(x, d.target, test_size=.3, stratify=d.target, random_state=0)
    return Source(x, y, x_test, y_test, _numbers(10), {})

def rare(path, seed):
    "The digit 3 against all others, one to twenty"
    d = digits(path, seed)
    y,y_test = (d.y == 3)*1,(d.y_test == 3)*1
    rest,own = np.flatnonzero(y == 0),np.flatnonzero(y == 1)
    keep = np.sort(np.concatenate([rest, own[:len(rest)//20]]))
    return Source(d.x[keep], y[keep], d.x_test, y_test, ['other','three'], {})

def _some(d, n, seed):
    "A random part of the training items, another one for each seed"
    at = np.sort(np.random.default_rng(seed).permutation(len(d.y))[:n])
    return d._replace(x=d.x[at], y=d.y[at], human={k: v[at] for k,v in d.human.items()})

def mnist(path, seed):
    "10,000 images of MNIST"
    dls = mnist_dls(path, download=False)
    sets = [(dl.store.images[dl.pos].numpy()[...,0], dl.store.targets[dl.pos].numpy()) for dl in (dls.train, dls.valid)]
    return _some(Source(*sets[0], *sets[1], _numbers(10), {}), 10000, seed)

@lru_cache(2)
def _features(file):
    z = np.load(file)
    x,x_test = (torch.from_numpy(z[o].astype(np.float32)) for o in ('x_train','x_test'))
    names = [str(o) for o in z['classes']] if 'classes' in z else _numbers(10)
    human = {k.split('_')[0]: z[k].astype(np.int64) for k in ('aggre_label','random_label1','worse_label') if k in z}
    return Source(x, z['y_train'].astype(np.int64), x_test, z['y_test'].astype(np.int64), names, human)

def features(path, seed): return _features(path/'cifar10_features.npz')
def features5k(path, seed): return _some(features(path, seed), 5000, seed)
def clothing(path, seed): return _features(path/'clothing_features.npz')

def adult(path, seed):
    "Adult census income, a table of 32,561 rows; a fifth of them for testing"
    df = pd.read_csv(path/'adult'/'adult.csv.gz', skipinitialspace=True, na_values='?')
    y = df.pop(df.columns[-1])
    test = np.random.default_rng(0).permutation(len(df)) < len(df)//5
    names = sorted(y.unique())
    y = y.map(names.index).to_numpy()
    return Source(df[~test], y[~test], df[test], y[test], names, {})

def trec(path, seed):
    "Questions by the type of their answer, six classes"
    def read(file):
        lines = (path/'trec'/file).read_text(encoding='latin-1').splitlines()
        return pd.DataFrame([(o.split(' ', 1)[1], o.split(':')[0]) for o in lines], columns=['text','type'])
    train,test = read('train_5500.label'),read('TREC_10.label')
    names = sorted(train.type.unique())
    y,y_test = (o.type.map(names.index).to_numpy() for o in (train, test))
    return Source(train[['text']], y, test[['text']], y_test, names, {})

@lru_cache(1)
def _photographs(path):
    from fastai_jocor.all import cifar10_dls
    dls = cifar10_dls(path, progress=False)
    human,y = {},np.load(path/'cifar10_features.npz')
    for name in ('aggre','worse'):
        human[name] = np.concatenate([y[f'{name}_label'][y['y_train'] == c] for c in range(10)]).astype(np.int64)
    sets = [(dl.store.images[dl.pos].numpy(), dl.store.targets[dl.pos].numpy()) for dl in (dls.train, dls.valid)]
    return Source(*sets[0], *sets[1], list(dls.vocab), human)

def cifar(path, seed):
    "10,000 images of CIFAR-10"
    return _some(_photographs(path), 10000, seed)

def cifar3k(path, seed):
    "3,000 images of CIFAR-10, to fine-tune a pretrained body on"
    return _some(_photographs(path), 3000, seed)

def clothing_photos(path, seed):
    "Photographs of clothes in ten classes, 3,068 for training"
    sets = [get_image_files(path/'clothing'/part).sorted() for part in ('train','test')]
    if not sets[0]: raise FileNotFoundError(path/'clothing'/'train')
    names = sorted({o.parent.name for o in sets[0]})
    labels = [np.array([names.index(o.parent.name) for o in files]) for files in sets]
    x,x_test = (np.array([str(o) for o in files]) for files in sets)
    return Source(x, labels[0], x_test, labels[1], names, {})

# Noise
digit_pairs = {7:1, 2:7, 5:6, 6:5, 3:8}
pairs = dict(digits=digit_pairs, mnist=digit_pairs, features={9:1, 2:0, 3:5, 5:3, 4:7}, adult={'>50K':'<=50K'},
             clothing={'shirt':'t-shirt', 't-shirt':'longsleeve', 'longsleeve':'shirt'},
             trec={'ENTY':'DESC', 'DESC':'ENTY', 'HUM':'ENTY', 'LOC':'NUM'})
pairs |= dict(features5k=pairs['features'], features30=pairs['features'], cifar=pairs['features'],
              clothing_photos=pairs['clothing'])

def given_labels(d, data, noise, seed):
    "The labels that the learner gets"
    name,_,rate = noise.partition(' ')
    if name == 'clean': return d.y
    if name in d.human: return d.human[name]
    rate = float(rate)/100
    if name == 'symmetric': return Symmetric(rate).corrupt(d.y, d.names, seed)
    if name == 'asymmetric': return Asymmetric(rate, pairs[data]).corrupt(d.y, d.names, seed)
    return InstanceDependent(rate).corrupt(d.y, d.names, seed, items=d.x)

# Learners
class ArrayDL(DataLoader):
    "Batches of a `TensorDataset`"
    def create_batches(self, samps):
        for idxs in chunked(samps, self.bs, self.drop_last): yield self.dataset[list(idxs)]

class MeanOfWords(nn.Module):
    "A perceptron on the mean of the words' vectors; word 1 is padding"
    def __init__(self, n_words, n_out, n=100):
        super().__init__()
        self.words = nn.Embedding(n_words, n, padding_idx=1)
        self.head = nn.Sequential(nn.Dropout(.25), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n_out))
    def forward(self, x):
        known = (x != 1).unsqueeze(-1).float()
        return self.head((self.words(x)*known).sum(1)/known.sum(1))

def image_learner(d, y, bs, **kwargs):
    n = len(y)
    x,labels = np.concatenate([d.x, d.x_test]),np.concatenate([y, d.y_test])
    dls = InMemoryDataLoaders.from_arrays(x, labels, d.names, train=np.arange(n), valid=np.arange(n, len(x)), bs=bs)
    if x.ndim == 4: return Learner(dls, jocor_cnn(len(d.names)), cbs=ChannelsLast(), **kwargs)
    return Learner(dls, jocor_mlp(len(d.names), x[0].size), **kwargs)

def feature_learner(d, y, bs, **kwargs):
    train,test = TensorDataset(d.x, torch.as_tensor(y)),TensorDataset(d.x_test, torch.as_tensor(d.y_test))
    first = ArrayDL(train, bs=bs, shuffle=True, drop_last=True, num_workers=0)
    dls = DataLoaders(first, ArrayDL(test, bs=1000, num_workers=0))
    kwargs = dict(loss_func=CrossEntropyLossFlat()) | kwargs
    return Learner(dls, jocor_mlp(len(d.names), d.x.shape[1]), **kwargs)

def table_learner(d, y, bs, **kwargs):
    df,n = pd.concat([d.x, d.x_test], ignore_index=True),len(y)
    df['label'] = np.array(d.names)[np.concatenate([y, d.y_test])]
    cont = [o for o in d.x if d.x[o].dtype.kind in 'iuf']
    cat = [o for o in d.x if o not in cont]
    to = TabularPandas(df, [Categorify, FillMissing, Normalize], cat, cont, 'label', CategoryBlock(),
                       splits=(list(range(n)), list(range(n, len(df)))))
    return tabular_learner(to.dataloaders(bs=bs), layers=[200,100], n_out=len(d.names), **kwargs)

def text_learner(d, y, bs, **kwargs):
    df = pd.concat([d.x, d.x_test], ignore_index=True)
    df['label'] = np.array(d.names)[np.concatenate([y, d.y_test])]
    df['test'] = np.arange(len(df)) >= len(y)
    block = DataBlock((TextBlock.from_df('text', n_workers=0), CategoryBlock(vocab=d.names)), get_x=ColReader('text'),
                      get_y=ColReader('label'), splitter=ColSplitter('test'))
    sets = block.datasets(df)
    dls = DataLoaders.from_dsets(list(sets.train), list(sets.valid), bs=bs, before_batch=pad_input, num_workers=0)
    kwargs = dict(loss_func=CrossEntropyLossFlat()) | kwargs
    return Learner(dls, MeanOfWords(len(sets.vocab[0]), len(d.names)), **kwargs)

WEIGHTS = os.environ.get('FASTAI_JOCOR_WEIGHTS')

def photo_learner(d, y, bs, size=96, **kwargs):
    "A pretrained body with a new head"
    n,x,labels = len(y),[*d.x, *d.x_test],np.concatenate([y, d.y_test])
    block = DataBlock((ImageBlock, CategoryBlock(vocab=d.names)), get_items=noop, get_x=lambda i: x[i],
                      get_y=lambda i: d.names[labels[i]], splitter=IndexSplitter(range(n, len(x))),
                      item_tfms=Resize(size, ResizeMethod.Squish))
    dls = block.dataloaders(list(range(len(x))), bs=bs, num_workers=0)
    if WEIGHTS: kwargs['pretrained_cfg_overlay'] = dict(file=WEIGHTS)
    return vision_learner(dls, 'tf_efficientnet_lite0', loss_func=kwargs.pop('loss_func', None), **kwargs)

def one_cycle(learn, epochs, lr, cbs): learn.fit_one_cycle(epochs, lr, cbs=cbs)
def fine_tuned(learn, epochs, lr, cbs): learn.fine_tune(epochs, lr, freeze_epochs=2, cbs=cbs)

# The cells
Data = namedtuple('Data', 'source learner bs noises schedules part fit', defaults=['fast', one_cycle])
simple = 'clean', 'symmetric 50', 'asymmetric 40'
light = 'clean', 'symmetric 30', 'asymmetric 30'
people = 'clean', 'aggre', 'random', 'worse', 'symmetric 50', 'asymmetric 40'
many = 'clean', 'symmetric 20', 'symmetric 50', 'symmetric 80', 'asymmetric 40', 'instance 40'
three = (15, 3e-3), (15, 1e-2), (60, 2e-2)
tables = dict(
    digits=Data(digits, image_learner, 64, many, three),
    rare=Data(rare, image_learner, 64, ['clean'], three),
    clothing=Data(clothing, feature_learner, 64, light, [(15, 3e-3)]),
    features5k=Data(features5k, feature_learner, 64, people, [(10, 3e-3), (30, 3e-3)]),
    trec=Data(trec, text_learner, 64, light, [(10, 1e-2)]),
    adult=Data(adult, table_learner, 256, light, [(5, 1e-2)]),
    mnist=Data(mnist, image_learner, 128, simple, [(10, 3e-3)]),
    features=Data(features, feature_learner, 128, people, [(10, 3e-3)]),
    features30=Data(features, feature_learner, 128, people, [(30, 3e-3)], 'slow'),
    cifar=Data(cifar, image_learner, 128, [*simple, 'worse'], [(10, 3e-3), (30, 3e-3)], 'slow'),
    clothing_photos=Data(clothing_photos, photo_learner, 64, light, [(4, 2e-3)], 'slow', fine_tuned),
    cifar3k=Data(cifar3k, photo_learner, 64, ['worse'], [(4, 2e-3)], 'slow', fine_tuned))
Cell = namedtuple('Cell', 'data noise epochs lr')

# The methods: how many networks, which loss, and which callback from the true noise rate
Method = namedtuple('Method', 'nets loss callback', defaults=[1, None, None])
methods = dict(
    plain=Method(),
    smooth=Method(loss=partial(LabelSmoothingCrossEntropyFlat, eps=.1)),
    averaged=Method(nets=3),
    jocor3=Method(callback=lambda tau: JoCorCallback(k=3)),
    jocor2=Method(callback=lambda tau: JoCorCallback(k=2)),
    jocor3_tau=Method(callback=lambda tau: JoCorCallback(k=3, forget_rate=tau)),
    jocor2_tau=Method(callback=lambda tau: JoCorCallback(k=2, forget_rate=tau)),
    schedule=Method(callback=lambda tau: JoCorCallback(k=3, rule='schedule', rounding='official')),
    by_hand=Method(callback=lambda tau: JoCorCallback(k=3, forget_rate=tau, balance=1)))

# The parts of the default, each switched off: some cells where something is at stake
ablation = {f'no_{part}': Method(callback=lambda tau, part=part: JoCorCallback(k=3, without=(part,)))
            for part in Evidence.parts}
at_stake = [Cell('digits', 'symmetric 50', 15, 3e-3), Cell('digits', 'symmetric 50', 60, 2e-2),
            Cell('digits', 'symmetric 80', 60, 2e-2), Cell('digits', 'asymmetric 40', 15, 3e-3),
            Cell('digits', 'instance 40', 15, 3e-3), Cell('rare', 'clean', 15, 3e-3),
            Cell('clothing', 'clean', 15, 3e-3), Cell('clothing', 'symmetric 30', 15, 3e-3),
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

def run(cell, name, seed, path):
    "One row: a cell, a method, a seed"
    method,d,start = (methods | ablation)[name],tables[cell.data].source(path, seed),time.time()
    y = given_labels(d, cell.data, cell.noise, seed)
    right = torch.as_tensor(y == d.y)
    wrong = float((~right).double().mean())
    trained = [train(d, y, cell, method, wrong, 100*i+seed) for i in range(method.nets)]
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
    machine = f'{os.cpu_count()} cores, {torch.get_num_threads()} used'
    return dict(row, wrong=wrong, seconds=time.time()-start, machine=machine)

def cells(part, only):
    "All cells of a part and of some data"
    for name,t in tables.items():
        if name not in only or part not in ('all', t.part): continue
        for epochs,lr in t.schedules:
            for noise in t.noises: yield Cell(name, noise, epochs, lr)

def rows(): return pd.read_csv(FILE) if FILE.exists() else pd.DataFrame(columns=KEY)

def do_run(key, path):
    "Run one row, print it, and add it to the file; a folder without the data is named"
    *cell,name,seed = key
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: row = run(Cell(*cell), name, seed, path)
        except FileNotFoundError as e: return print(f'{cell[0]} is left out: {e}', flush=True)
    print({k: round(v, 4) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    FILE.parent.mkdir(exist_ok=True)
    pd.DataFrame([row]).to_csv(FILE, mode='a', header=not FILE.exists(), index=False, float_format='%.5g')

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
    only:str=','.join(methods), # Which methods
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
    for key in [] if summary_only else todo:
        if key not in done: do_run(key, path)
    print(summary(rows()).to_string())
