"""A small folder with some pictures in the wrong place: what does `jocor_audit` find, and how large should they be?

    python benchmarks/small_audit.py --path FOLDER --arch tf_efficientnet_lite0 --weights FILE
    python benchmarks/small_audit.py --only-table

FOLDER holds `cifar10/train/<class>/*.jpg`. For each seed, 120 pictures of each of four classes are copied, 15% of them
into the folder of another of these classes. Classes, pictures and wrong folders are drawn by the seed. The command runs
as a user types it, in a new process and without features from before. Each row of results/small_audit.csv is one audit;
rows that are there are not made again. `seconds` go from the command to the page.
"""
import os, re, shutil, subprocess, sys, tempfile, time, numpy as np, pandas as pd
from pathlib import Path
from fastcore.script import call_parse

FILE = Path(__file__).resolve().parent/'results'/'small_audit.csv'
KEY = ['size','seed']

def true_label(file): return Path(file).name.split('_')[0]
def is_wrong(file): return true_label(file) != Path(file).parent.name

def make_folder(source, folder, seed, n_classes=4, n=120, rate=.15):
    "Copy `n` pictures of each of some classes, a share of them into the folder of another class"
    rng = np.random.default_rng(seed)
    classes = sorted(rng.choice(sorted(o.name for o in source.iterdir()), n_classes, replace=False))
    for c in classes:
        files = sorted((source/c).glob('*.jpg'))
        for file in rng.choice(files, n, replace=False):
            to = rng.choice([o for o in classes if o != c]) if rng.random() < rate else c
            (folder/to).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder/to/f'{c}_{file.name}')
    return folder

def audit(folder, out, size, arch, weights):
    "Run the command; gives the seconds it took, what it printed, and the suspects' files"
    command = [Path(sys.executable).with_name('jocor_audit'), folder, '--out', out, '--size', str(size), '--arch', arch]
    if weights: command += ['--weights', weights]
    start = time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return time.perf_counter()-start, said, pd.read_csv(out/'suspects.csv')['item']

def run(source, size, seed, arch, weights):
    "One row"
    with tempfile.TemporaryDirectory() as tmp:
        folder = make_folder(source, Path(tmp)/'pictures', seed)
        wrong = sum(map(is_wrong, folder.rglob('*.jpg')))
        items = len(list(folder.rglob('*.jpg')))
        seconds,said,suspects = audit(folder, Path(tmp)/'audit', size, arch, weights)
    hits = sum(is_wrong(Path('pictures')/o) for o in suspects)
    between = re.search(r'labels are wrong, between (\d+) and (\d+)', said) # nothing is said where nothing was learned
    low,high = map(int, between.groups()) if between else (0,items)
    precision = hits/len(suspects) if len(suspects) else np.nan
    return dict(size=size, seed=seed, items=items, wrong=wrong, listed=len(suspects), precision=precision,
                recall=hits/wrong, low=low, high=high, seconds=seconds, machine=f'{os.cpu_count()} cores')

def rows(): return pd.read_csv(FILE) if FILE.exists() else pd.DataFrame(columns=KEY)

def summary(df):
    "Mean and standard deviation over the seeds, by size"
    of = df.assign(holds=(df.low <= df.wrong) & (df.wrong <= df.high)).groupby('size')
    res = of[['precision','recall']].agg(['mean','std']).round(2)
    res.columns = ['precision', '±', 'recall', '± ']
    return res.assign(holds=of.holds.sum(), seconds=of.seconds.median().round(), seeds=of['items'].size())

@call_parse
def main(
    path:Path=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    arch:str='resnet18', # Network with a pretrained body
    weights:str=None, # File of its weights
    sizes:str='96,128,224', # Sides to which pictures are brought, in pixels
    seeds:str='0-9', # Seeds, as a range
    only_table:bool=False # Print what is there, and run nothing
):
    "Make the rows that are missing, and print means"
    a,b = map(int, seeds.split('-'))
    done = {tuple(o) for o in rows()[KEY].itertuples(index=False)}
    todo = [(int(size), seed) for seed in range(a, b+1) for size in sizes.split(',')]
    for key in [] if only_table else [o for o in todo if o not in done]:
        row = run(Path(path)/'cifar10'/'train', *key, arch, weights)
        print({k: round(v, 2) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
        pd.DataFrame([row]).to_csv(FILE, mode='a', header=not FILE.exists(), index=False, float_format='%.4g')
    print(summary(rows()).to_string())
