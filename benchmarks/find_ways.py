"""The data that find.py looks for wrong labels in, and the ways to find them"""
import numpy as np, pandas as pd, torch
from collections import namedtuple
from functools import lru_cache
from fastai.basics import *
from scipy.sparse import issparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict, StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from fastai_jocor.all import audit_labels, JoCorCallback
from fastai_jocor.audit import rank_suspects
from fastai_jocor.feature_loaders import FeatureDL, FeatureItems, Projection
from fastai_jocor.heads import fused_adam, new_head
from fastai_jocor.judge import default_batch, default_epochs, NoValidation
from everyday_data import adult, clothing, digits, features, features10k, features5k, table_learner, text_learner, trec

LR = 3e-3 # of the networks, as in `audit_labels` on fewer than 40,000 items

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
    features=Data(features, head_learner, np.asarray, 512, people, 3),
    features5k=Data(features5k, head_learner, np.asarray, 128, [*people, 'clean'], 3),
    features10k=Data(features10k, head_learner, np.asarray, 128, people, 3),
    clothing=Data(projected(clothing), head_learner, np.asarray, 64,
                  ['symmetric 30', 'asymmetric 30', 'symmetric 15'], 3),
    trec=Data(trec, text_learner, of_words, 64, ['symmetric 20'], 3),
    adult=Data(adult, table_learner, of_columns, 256, ['symmetric 20'], 3),
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
        lr = default_batch(len(y))[1] if torch.is_tensor(d.x) else LR # as on features
        res = audit_labels(learn, k, lr=lr, seed=seed, neighbours=False, progress=False)
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
    listed[rank_suspects(cb.ledger).index] = True
    counts = [len(y)*o for o in (cb.estimate.rate, cb.estimate.low, cb.estimate.high)]
    return dict(recent=Found(cb.items.frame().recent_loss.to_numpy(), listed, None, *counts))

def fit(k):
    def find(table, d, y, seed):
        cb = JoCorCallback(k=k, seed=seed)
        trained(table, d, y, seed, cb)
        listed,e = np.zeros(len(y), bool),cb.expected_wrong()
        listed[cb.suspects().index] = True
        return dict(recent=Found(cb.items.frame().recent_loss.to_numpy(), listed, cb.p_wrong, e['expected'], e['low'],
                                 e['high']))
    return find

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

def datalab(table, d, y, seed):
    "cleanlab's Datalab, which is given features alone"
    from cleanlab import Datalab
    lab = Datalab(dict(label=y), label_name='label', verbosity=0)
    x = table.matrix(d.x)
    if issparse(x): x = x.toarray() # of words
    lab.find_issues(features=np.asarray(x, np.float32), issue_types=dict(label={}))
    found = lab.get_issues('label')
    wrong = 1-found.label_score.to_numpy()
    return dict(label_score=Found(wrong, found.is_label_issue.to_numpy(bool), wrong))

def neighbours(table, d, y, seed):
    x = normalize(table.matrix(d.x))
    near = NearestNeighbors(n_neighbors=10).fit(x).kneighbors(return_distance=False)
    votes = (y[near][...,None] == np.arange(len(d.names))).sum(1)
    own = votes[np.arange(len(y)),y]
    return dict(votes=Found(-own, own < votes.max(1)))

def top_loss(table, d, y, seed):
    p = said(trained(table, d, y, seed), 0)
    return dict(loss=Found(-p[np.arange(len(y)),y]))

ways = dict(audit_3=audit(3), lr=lr, mlp=mlp, ledger=ledger, neighbours=neighbours, top_loss=top_loss, fit_3=fit(3),
            audit_2=audit(2), audit_5=audit(5), datalab=datalab)
