"""From files to the page of suspects: how long does each stage of `jocor_audit` take?

    python benchmarks/audit_time.py FOLDER --arch tf_efficientnet_lite0 --size 64
    python benchmarks/audit_time.py labels.csv --path FOLDER --true-col true

FOLDER and labels.csv are those of `jocor_audit`. The audit is done twice, the second time with the features that the
first one has kept, into a folder that is removed at the end. results/audit_time.json tells the seconds of each stage.
"""
import json, tempfile, time, pandas as pd
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch
from fastcore.script import call_parse
from fastai_jocor import feature_loaders, find
from fastai_jocor.lab import review
from fastai_jocor.lab.run import machine

FILE = Path(__file__).resolve().parent/'results'/'audit_time.json'
stages = {'find images that cannot be read': (review, 'readable'), 'make the learner': (review, 'audit_learner'),
          'pass of the body, or its features from disk': (feature_loaders, 'kept_features'),
          'train the heads': (find, 'fit_heads'), 'nearest neighbours': (find, 'nearest_of'),
          'probabilities and notes': (find, 'LabelAudit'), 'tables and page': (review, '_write')}

def timed(fn, name, seconds):
    "The same function, which notes how long it takes"
    def call(*args, **kwargs):
        start = time.perf_counter()
        try: return fn(*args, **kwargs)
        finally: seconds[name] = seconds.get(name, 0.)+time.perf_counter()-start
    return call

def audit(source, **kwargs):
    "One audit; gives the seconds of its stages, and the suspects"
    seconds,start = {},time.perf_counter()
    with ExitStack() as stack:
        for name,(module,fn) in stages.items():
            stack.enter_context(patch.object(module, fn, timed(getattr(module, fn), name, seconds)))
        suspects = review.audit(source, **kwargs)
    seconds['train the heads'] -= seconds['pass of the body, or its features from disk'] # in which they lie
    seconds['all'] = time.perf_counter()-start
    return {name: round(o, 1) for name,o in seconds.items()},suspects

@call_parse
def main(
    source:str, # Folder with a folder of images for each class, or a CSV
    path:str=None, # Folder that the CSV's files are relative to
    true_col:str=None, # Column of the CSV with true labels
    arch:str='resnet18', # Network with a pretrained body
    weights:str=None, # File of its weights
    size:int=128 # Side to which images are brought, in pixels
):
    "Time two audits, and write results/audit_time.json"
    with tempfile.TemporaryDirectory() as out:
        kwargs = dict(path=path, true_col=true_col, arch=arch, weights=weights, size=size, out=out)
        first,suspects = audit(source, **kwargs)
        again,_ = audit(source, **kwargs)
        items = len(pd.read_csv(Path(out)/'items.csv'))
    row = dict(items=items, suspects=len(suspects), arch=arch, size=size, first=first, again=again, machine=machine())
    if 'flipped' in suspects: row['precision'] = round(float(suspects.flipped.mean()), 3)
    FILE.write_text(json.dumps(row, indent=1)+'\n')
    print(json.dumps(row, indent=1))
