"""How well are wrong labels found? `audit_labels` against cleanlab, votes of neighbours, and top losses

    pip install cleanlab
    python benchmarks/find.py --path FOLDER         # all rows that are missing, then the tables
    python benchmarks/find.py --path FOLDER --data clothing --ways audit_3,lr --seeds 1
    python benchmarks/find.py --only-tables

FOLDER, or the environment variable FASTAI_JOCOR_DATA, holds the data as everyday.py describes them; data that are not
there are left out, and named. Each way of results/find.csv has one row for each data set, noise and seed; rows that are
there are not made again. All ways see the same given labels, and none sees the true ones:

    audit_2, _3, _5   `audit_labels` with so many heads on features; with whole models for text and tables
    lr                cleanlab, on probabilities of 5-fold cross-validation of scikit-learn's logistic regression
    mlp               cleanlab, on probabilities of 5-fold cross-validation of the same head or whole model
    ledger            one network trained by `JoCorCallback(k=1)`, and the ledger's score `recent`
    neighbours        the share of the 10 nearest neighbours (by cosine) that have the label, as in SimiFeat
    top_loss          the loss of each item under one network that was trained on all of them

Features are what a pretrained body sees, as their first 256 principal components. These help logistic regression, too:
with symmetric 30 on clothing, its average precision is 0.87 on them, and 0.74 on all 1,280 numbers. For text and
tables, `lr` and `neighbours` see TF-IDF of words, or standardised numbers beside one-hot categories. All networks have
the same size, optimizer, learning rate and number of epochs. cleanlab's two label qualities have a row each, and
1 − quality stands for the probability that a label is wrong. Datalab is left out: it needs the package `datasets`.

Seconds go from features to the list, on one thread. `cpu_seconds` do not count what other programs did meanwhile.
"""
import os, time, warnings, numpy as np, pandas as pd, torch
from collections import namedtuple
from functools import lru_cache
from pathlib import Path
from fastcore.script import call_parse
from fastai.basics import *
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict, StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from fastai_jocor.all import audit_labels, JoCorCallback
from fastai_jocor.features import FeatureDL, FeatureItems, Projection
from fastai_jocor.heads import fused_adam, new_head
from fastai_jocor.judge import default_epochs, NoValidation
from fastai_jocor.posterior import calibration_error
from everyday_data import (adult, clothing, digits, features, features10k, given_labels, table_learner, text_learner,
                           trec)

FILE = Path(__file__).resolve().parent/'results'/'find.csv'
KEY = ['data','noise','seed','way']
LR = 3e-3 # of the networks, as in `audit_labels`

# What a way finds. `score`: larger for labels that are more probably wrong; `listed`: bool; the others may be missing
Found = namedtuple('Found', 'score listed p_wrong expected low high', defaults=[None,None,np.nan,np.nan,np.nan])

# The data
def projected(source):
    "Principal components in place of features"
    @lru_cache(1)
    def components(path, seed):
        d = source(path, seed)
        projection = Projection(d.x.numpy())
        return d._replace(x=projection(d.x), x_test=projection(d.x_test))
    return components

def pixels(path, seed):
    "The pixels of digits as features, for a dry run"
    d = digits(path, seed)
    x,x_test = (torch.from_numpy(o.reshape(len(o), -1)/255.).float() for o in (d.x, d.x_test))
    return d._replace(x=x, x_test=x_test)

def head_learner(d, y, bs, **kwargs):
    "A head on features; a learner on features is an ordinary learner, so `audit_labels` takes it"
    train,test = (FeatureItems(x, labels, range(len(x)), d.names) for x,labels in ((d.x, y), (d.x_test, d.y_test)))
    bs = 64 if len(y) < 5000 else bs
    dls = DataLoaders(FeatureDL(train, bs=bs, shuffle=True, drop_last=True), FeatureDL(test, bs=1000))
    return Learner(dls, new_head(d.x.shape[1], len(d.names)), loss_func=CrossEntropyLossFlat(), **kwargs)

def of_words(x): return TfidfVectorizer().fit_transform(x.text)

def of_columns(x):
    numbers = x.select_dtypes('number')
    rest = pd.get_dummies(x.drop(columns=numbers.columns), dummy_na=True)
    return pd.concat([(numbers-numbers.mean())/numbers.std(), rest], axis=1).to_numpy(np.float32)

people = 'worse', 'aggre', 'symmetric 20', 'asymmetric 40', 'random', 'symmetric 50'
Data = namedtuple('Data', 'source learner matrix bs noises seeds')
tables = dict(
    features=Data(features, head_learner, np.asarray, 128, people, 1),
    features10k=Data(features10k, head_learner, np.asarray, 128, people, 3),
    clothing=Data(projected(clothing), head_learner, np.asarray, 64,
                  ['symmetric 30', 'asymmetric 30', 'symmetric 15'], 3),
    trec=Data(trec, text_learner, of_words, 64, ['symmetric 20'], 2),
    adult=Data(adult, table_learner, of_columns, 256, ['symmetric 20'], 2),
    digits=Data(pixels, head_learner, np.asarray, 64, ['symmetric 20'], 1))

# The ways: from the data, the given labels and a seed to what is found, by the names of the scores
def trained(table, d, y, seed, *cbs):
    "An ordinary learner, trained on the given labels"
    set_seed(seed)
    learn = table.learner(d, y, table.bs, opt_func=fused_adam)
    cbs = [*cbs, NoValidation()]
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(default_epochs(len(y)), LR, cbs=cbs)
    return learn

def said(learn, part):
    "Probabilities that a learner gives the items of its training set (0) or validation set (1)"
    with learn.no_bar(), learn.no_logging(): return learn.get_preds(part)[0].double().numpy()

def audit(k):
    def find(table, d, y, seed):
        if torch.is_tensor(d.x): d = d._replace(x_test=d.x_test[:0], y_test=d.y_test[:0]) # spend no time on them
        set_seed(seed)
        learn = table.learner(d, y, table.bs)
        res = audit_labels(learn, k, lr=LR, seed=seed, neighbours=False, progress=False)
        of_train = res.table[res.table.part == 'train']
        assert (res.labels[:len(y)] == y).all() and (of_train.position == np.arange(len(y))).all()
        listed = np.zeros(len(y), bool)
        listed[res.suspects(part='train').position] = True
        e,p = res.expected_wrong('train'),of_train.p_wrong.to_numpy()
        return dict(p_wrong=Found(p, listed, p, e['expected'], e['low'], e['high']))
    return find

def ledger(table, d, y, seed):
    cb = JoCorCallback(k=1, seed=seed)
    trained(table, d, y, seed, cb)
    listed = np.zeros(len(y), bool)
    listed[cb.suspects().index] = True
    counts = [len(y)*o for o in (cb.estimate.rate, cb.estimate.low, cb.estimate.high)]
    return dict(recent=Found(cb.items.frame().recent_loss.to_numpy(), listed, None, *counts))

def folds(y, seed): return StratifiedKFold(5, shuffle=True, random_state=seed).split(y, y)

def by_cleanlab(y, p):
    "What cleanlab says of out-of-sample probabilities"
    from cleanlab.count import num_label_issues
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    p = p/p.sum(1, keepdims=True)
    listed,n = find_label_issues(y, p, n_jobs=1),float(num_label_issues(y, p))
    methods = 'self_confidence','normalized_margin'
    wrong = {m: 1-get_label_quality_scores(y, p, method=m) for m in methods}
    return {m: Found(o, listed, o, n) for m,o in wrong.items()}

def lr(table, d, y, seed):
    x = table.matrix(d.x)
    p = cross_val_predict(LogisticRegression(), x, y, cv=list(folds(y, seed)), method='predict_proba')
    return by_cleanlab(y, p)

def mlp(table, d, y, seed):
    p = np.zeros((len(y), len(d.names)))
    some = lambda at: d.x.iloc[at] if hasattr(d.x, 'iloc') else d.x[at]
    for fold,(train,out) in enumerate(folds(y, seed)):
        part = d._replace(x=some(train), y=d.y[train], x_test=some(out), y_test=y[out])
        p[out] = said(trained(table, part, y[train], 10*seed+fold), 1)
    return by_cleanlab(y, p)

def neighbours(table, d, y, seed):
    x = normalize(table.matrix(d.x))
    near = NearestNeighbors(n_neighbors=10).fit(x).kneighbors(return_distance=False)
    votes = (y[near][...,None] == np.arange(len(d.names))).sum(1)
    own = votes[np.arange(len(y)),y]
    return dict(votes=Found(-own, own < votes.max(1)))

def top_loss(table, d, y, seed):
    p = said(trained(table, d, y, seed), 0)
    return dict(loss=Found(-p[np.arange(len(y)),y]))

ways = dict(audit_3=audit(3), lr=lr, mlp=mlp, ledger=ledger, neighbours=neighbours, top_loss=top_loss, audit_2=audit(2),
            audit_5=audit(5))

def share(part, of): return float(part.sum()/of.sum()) if of.any() else np.nan

def figures(found, wrong):
    "How good that is, from which labels are wrong, shape (n,), bool"
    score = np.nan_to_num(found.score.astype(float), nan=-np.inf, neginf=-np.inf)
    score = np.maximum(score, score[np.isfinite(score)].min()-1)
    first,n = np.argsort(-score, kind='stable'),int(wrong.sum())
    row = dict(items=len(wrong), wrong=n, average_precision=float(average_precision_score(wrong, score)),
               precision_at_n=float(wrong[first[:n]].mean()))
    if found.listed is not None:
        hits = found.listed & wrong
        row |= dict(listed=int(found.listed.sum()), precision=share(hits, found.listed), recall=share(hits, wrong))
    row |= dict(expected=found.expected, low=found.low, high=found.high)
    row['holds'] = np.nan if np.isnan(found.low) else float(found.low <= n <= found.high)
    row['ece'] = np.nan if found.p_wrong is None else calibration_error(found.p_wrong, wrong)
    return row

COLUMNS = [*KEY,'score','items','wrong','average_precision','precision_at_n','listed','precision','recall','expected',
           'low','high','holds','ece','seconds','cpu_seconds','machine']

def run(data, noise, seed, way, path):
    "The rows of one way, one for each of its scores"
    table = tables[data]
    d = table.source(path, seed)
    y = given_labels(d, data, noise, seed)
    start,cpu = time.perf_counter(),time.process_time()
    found = ways[way](table, d, y, seed)
    took = dict(seconds=time.perf_counter()-start, cpu_seconds=time.process_time()-cpu,
                machine=f'{os.cpu_count()} cores, {torch.get_num_threads()} used')
    first = dict(zip(KEY, (data, noise, seed, way)))
    return [first | dict(score=name) | figures(f, y != d.y) | took for name,f in found.items()]

def rows(): return pd.read_csv(FILE) if FILE.exists() else pd.DataFrame(columns=COLUMNS)

def do_run(key, path):
    "Do one way, print its rows, and add them to the file; what is missing for it is named"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: new = run(*key, path)
        except (FileNotFoundError, ModuleNotFoundError) as e: return print(f'{key} is left out: {e}', flush=True)
    for row in new: print({k: round(v, 4) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    FILE.parent.mkdir(exist_ok=True)
    df = pd.DataFrame(new, columns=COLUMNS)
    df.to_csv(FILE, mode='a', header=not FILE.exists(), index=False, float_format='%.5g')

def order(data, which, seeds):
    "All that is to be run, the most telling first"
    last = 'audit_2','audit_5'
    slow = 'ledger','neighbours','top_loss'
    rank = lambda d, w: (w in last, d == 'features10k', d == 'features' and w in slow, d == 'features' and w == 'mlp',
                         d in ('trec','adult'))
    keys = [(d, noise, seed, w) for d in data for seed in range(min(tables[d].seeds, seeds))
            for noise in tables[d].noises for w in which]
    return sorted(keys, key=lambda o: rank(o[0], o[3]))

def named(df):
    "Ways with the names of their scores, where they have several"
    several = df.way.isin(['lr','mlp'])
    return df.assign(way=np.where(several, df.way+' '+df.score, df.way))

def by_way(df, value):
    "Means over seeds, a column for each way"
    return named(df).pivot_table(index=['data','noise'], columns='way', values=value, sort=False)

def against_best(df):
    "Average precision of each audit less that of the best of cleanlab's ways, in points, for each data, noise and seed"
    t = 100*named(df).pivot_table(index=KEY[:3], columns='way', values='average_precision', sort=False)
    theirs = t[[o for o in t if o.startswith(('lr','mlp'))]]
    ours = t[[o for o in t if o.startswith('audit')]]
    best = theirs.max(axis=1)
    return ours.sub(best, axis=0).add_suffix(' − best').assign(best=best, way=theirs.idxmax(axis=1))

@pd.option_context('display.width', 200, 'display.max_rows', None, 'display.max_columns', None)
def print_tables(df):
    place = lambda column: column.map(list(tables if column.name == 'data' else ways).index)
    df = df.sort_values(['data','way'], key=place, kind='stable')
    told = dict(average_precision=100, precision_at_n=100, ece=100, cpu_seconds=1)
    for name,scale in told.items():
        times = ' × 100' if scale > 1 else ''
        print(f'\n{name}{times}\n{(scale*by_way(df, name)).round(1)}')
    mine = named(df)[df.low.notna()]
    counts = mine.groupby(['data','noise','way'], sort=False)[['wrong','expected','low','high','holds']].mean().round(2)
    print(f'\nHow many are wrong, and how often the interval holds it\n{counts}')
    lists = named(df)[df.listed.notna()]
    lists = lists.groupby(['data','noise','way'], sort=False)[['wrong','listed','expected','precision','recall']].mean()
    print(f'\nThe lists\n{lists.round(3)}')
    print(f'\nAverage precision × 100, less the best of the ways of cleanlab\n{against_best(df).round(1)}')

@call_parse
def main(
    path:str=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    data:str='features,clothing,trec,adult,features10k', # Which data; `digits` for a dry run
    ways:str=','.join(ways), # Which ways
    seeds:int=3, # At most so many seeds of each data set
    only_tables:bool=False # Print the tables of what is there, and run nothing
):
    "Make the rows that are not there yet, and print the tables"
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    done = {tuple(o) for o in rows()[KEY].itertuples(index=False)}
    for key in [] if only_tables else order(data.split(','), ways.split(','), seeds):
        if key not in done: do_run(key, Path(path))
    print_tables(rows())
