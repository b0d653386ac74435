"""How well are wrong labels found? `audit_labels` against cleanlab, votes of neighbours, and top losses

    pip install cleanlab datasets
    python benchmarks/find.py --path FOLDER         # all rows that are missing, then the tables
    python benchmarks/find.py --path FOLDER --data clothing --ways audit_3,lr --seeds 1
    python benchmarks/find.py --path FOLDER --data features5k,clothing --ways fit_3   # how sure an ordinary fit is
    python benchmarks/find.py --only-tables

FOLDER, or the environment variable FASTAI_JOCOR_DATA, holds the data as everyday.py describes them; data that are not
there are left out, and named. Each way of results/find.csv has one row for each data set, noise and seed; rows that are
there are not made again. All ways see the same given labels, and none sees the true ones:

    audit_2, _3, _5   `audit_labels` with so many heads on features; with whole models for text and tables
    lr                cleanlab, on probabilities of 5-fold cross-validation of scikit-learn's logistic regression
    mlp               cleanlab, on probabilities of 5-fold cross-validation of the same head or whole model
    datalab           cleanlab's Datalab, which is given the features alone, and finds their neighbours
    ledger            one network trained by `JoCorCallback(k=1)`, and the ledger's score `recent`
    fit_3             three networks trained by `JoCorCallback(k=3)` as for use, and their list of suspects
    neighbours        the share of the 10 nearest neighbours (by cosine) that have the label, as in SimiFeat
    top_loss          the loss of each item under one network that was trained on all of them

Features are what a pretrained body sees, as their first 256 principal components. These help logistic regression, too:
with symmetric 30 on clothing, its average precision is 0.87 on them, and 0.74 on all 1,280 numbers. For text and
tables, `lr` and `neighbours` see TF-IDF of words, or standardised numbers beside one-hot categories. All networks have
the same size, optimizer, learning rate and number of epochs. cleanlab's two label qualities have a row each, and
1 − quality stands for the probability that a label is wrong.

Seconds go from features to the list, on one thread. `cpu_seconds` do not count what other programs did meanwhile.
"""
import os, time, warnings, numpy as np, pandas as pd, torch
from pathlib import Path
from fastcore.script import call_parse
from sklearn.metrics import average_precision_score
from fastai_jocor.posterior import calibration_error
from everyday_data import given_labels
from find_ways import tables, ways

FILE = Path(__file__).resolve().parent/'results'/'find.csv'
KEY = ['data','noise','seed','way']

def share(part, of): return float(part.sum()/of.sum()) if of.any() else np.nan

def figures(found, wrong):
    "How good that is, from which labels are wrong, shape (n,), bool"
    score = np.nan_to_num(found.score.astype(float), nan=-np.inf, neginf=-np.inf)
    score = np.maximum(score, score[np.isfinite(score)].min()-1)
    first,n = np.argsort(-score, kind='stable'),int(wrong.sum())
    row = dict(items=len(wrong), wrong=n)
    if n: row |= dict(average_precision=float(average_precision_score(wrong, score)),
                      precision_at_n=float(wrong[first[:n]].mean()))
    if found.listed is not None:
        hits = found.listed & wrong
        row |= dict(listed=int(found.listed.sum()), precision=share(hits, found.listed), recall=share(hits, wrong))
    row |= dict(expected=found.expected, low=found.low, high=found.high)
    row['holds'] = np.nan if np.isnan(found.low) else float(found.low <= n <= found.high)
    row['ece'] = np.nan
    if found.p_wrong is None: return row
    known = ~np.isnan(found.p_wrong)
    return row | dict(ece=calibration_error(found.p_wrong[known], wrong[known]))

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
    slow = 'ledger','neighbours','top_loss','datalab'
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
    cleanlab = [o for o in t if o.startswith(('lr','mlp','datalab'))]
    t = t.dropna(how='all', subset=cleanlab)
    best = t[cleanlab].max(axis=1)
    ours = t[[o for o in t if o.startswith('audit')]]
    return ours.sub(best, axis=0).add_suffix(' − best').assign(best=best, way=t[cleanlab].idxmax(axis=1))

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
