"""Are near duplicates of real photographs found? Copies of some of them, recompressed, cut, or a little brighter

    python benchmarks/duplicates.py --path FOLDER --weights FILE     # a row for each threshold and kind of copy

FOLDER holds `clothing/train/<class>` and `cifar10/train/<class>`. Of 1,000 photographs, 100 are copied: saved as JPEG
with quality 60, cut by 2 pixels on each side, or 15% brighter. `recall` is the share of copies that are found as pairs
with their originals, `false` the number of pairs of other photographs. Some of these are real: look at them with
`--show`, which prints their files.
"""
import os, shutil, tempfile, warnings, numpy as np, pandas as pd, torch
from pathlib import Path
from fastcore.script import call_parse
from fastai.vision.all import *
from PIL import Image, ImageEnhance
from fastai_jocor.feature_loaders import feature_dls
from fastai_jocor.find import nearest_of
from fastai_jocor.neighbours import near_duplicates

FILE = Path(__file__).resolve().parent/'results'/'duplicates.csv'
THRESHOLDS = .1, .2, .3, .4, .5, .6

def cut(im): return im.crop((2, 2, im.width-2, im.height-2))
def brighter(im): return ImageEnhance.Brightness(im).enhance(1.15)
ways = dict(recompressed=(lambda im: im, 60), cut=(cut, 95), brighter=(brighter, 95))

def with_copies(source, folder, n=1000, n_copies=100, seed=0):
    "Copy some photographs into one folder for each class, and make near duplicates of some of them"
    files = np.array(get_image_files(source).sorted())
    some = files[np.random.default_rng(seed).permutation(len(files))[:n]]
    for i,file in enumerate(some):
        own = folder/file.parent.name
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, own/f'{i}.original{file.suffix}')
        if i >= n_copies: continue
        for name,(change,quality) in ways.items():
            change(Image.open(file).convert('RGB')).save(own/f'{i}.{name}.jpg', quality=quality)

def loaders_of(folder, size):
    return ImageDataLoaders.from_folder(folder, valid_pct=.1, seed=0, bs=64, num_workers=0,
                                        item_tfms=Resize(size, ResizeMethod.Squish))

def figures(pairs, names, n_copies):
    "Recall of each kind of copy, and the pairs of different photographs"
    ids,kinds = zip(*[Path(o).name.split('.')[:2] for o in names])
    found,false = dict.fromkeys(ways, 0),[]
    for a,b in zip(pairs['first'].astype(int), pairs['second'].astype(int)):
        kind = {kinds[a],kinds[b]}-{'original'}
        if ids[a] != ids[b]: false.append((names[a], names[b]))
        elif len(kind) == 1 and 'original' in (kinds[a],kinds[b]): found[kind.pop()] += 1
    return {name: o/n_copies for name,o in found.items()},false

def measure(learn, n_copies, thresholds=THRESHOLDS):
    "Yields a threshold, the recall of each kind of copy, and the pairs of different photographs"
    dls = feature_dls(learn, progress=False)
    distances,positions = nearest_of(dls)
    names = [str(o) for dl in dls.loaders for o in dl.dataset.items]
    for within in thresholds: yield within,*figures(near_duplicates(distances, positions, within), names, n_copies)

@call_parse
def main(
    path:str=os.environ.get('FASTAI_JOCOR_DATA', '.'), # Folder of the data
    weights:str=None, # File of the body's weights
    n:int=1000, # Photographs
    n_copies:int=100, # How many of them are copied
    size:int=96, # Side to which they are brought, in pixels
    show:bool=False # Print the files of pairs of different photographs
):
    "Measure, write the file, and print it"
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    rows = []
    for data in ('clothing','cifar10'):
        with tempfile.TemporaryDirectory() as tmp:
            with_copies(Path(path)/data/'train', Path(tmp), n, n_copies)
            cfg = dict(pretrained_cfg_overlay=dict(file=weights)) if weights else {}
            learn = vision_learner(loaders_of(Path(tmp), size), 'tf_efficientnet_lite0', path=tmp, **cfg)
            for within,recall,false in measure(learn, n_copies):
                rows.append(dict(data=data, photographs=n, copied=n_copies, within=within, **recall, false=len(false)))
                print(rows[-1], flush=True)
                if show: print(*false, sep='\n')
    pd.DataFrame(rows).to_csv(FILE, index=False, float_format='%.4g')
