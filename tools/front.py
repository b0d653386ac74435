"""Draw the pictures of the home page, nbs/images/everyday.png and nbs/images/suspects.jpg.

    python tools/front.py                              # accuracy, from benchmarks/results/everyday.csv
    python tools/front.py --path DATA                  # the photographs, too
    python tools/front.py --path DATA --weights FILE   # audits the photographs first; `none`: timm's own weights

DATA has the photographs in clothing/{train,validation}/<class>, from
https://github.com/alexeygrigorev/clothing-dataset-small (CC0). The audit is written to
benchmarks/results/clothing_suspects.csv. everyday.png carries a mark of the runs that it shows, so that a test can
tell when others are there. `python tools/docs.py` draws it anew then.
"""
import argparse, hashlib, sys, pandas as pd
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'benchmarks'/'results'
RUNS,SUSPECTS = RESULTS/'everyday.csv',RESULTS/'clothing_suspects.csv'
IMAGES = ROOT/'nbs'/'images'
PICTURE,PHOTOGRAPHS = IMAGES/'everyday.png',IMAGES/'suspects.jpg'

# What the home page shows: a name, data/noise/epochs in everyday.csv
CELLS = {'Photographs of clothes, 30% wrong': 'clothing/symmetric 30/15',
         'Photographs of clothes, right labels': 'clothing/clean/15',
         'CIFAR-10, 5,000 images, labels by people, 40% wrong': 'features5k/worse/30',
         'CIFAR-10, 5,000 images, right labels': 'features5k/clean/30',
         'Questions (TREC), 30% wrong': 'trec/symmetric 30/10',
         'Questions (TREC), right labels': 'trec/clean/10',
         'A table (Adult), 30% wrong': 'adult/symmetric 30/5',
         'A table (Adult), right labels': 'adult/clean/5'}
WAYS = {'plain': 'plain training', 'averaged': 'three plain networks, averaged', 'jocor3': 'JoCorCallback(k=3)'}
COLORS = {'plain': 'tab:gray', 'averaged': 'tab:orange', 'jocor3': 'tab:blue'}

# Of the audit, chosen by eye: photographs whose label a person finds wrong
SHOWN = ('7aefbf16', '284568fb', 'b8c71b29', '5c9b07a9', 'b6560a66', '39948029')

def accuracies(runs=RUNS):
    "Mean test accuracy in per cent, a row a cell and a column a way, and the number of seeds that all ways have"
    df = pd.read_csv(runs)
    df = df[df.method.isin(WAYS)].assign(cell=df.data+'/'+df.noise+'/'+df.epochs.astype(str))
    each = df.pivot_table(index=['cell','seed'], columns='method', values='accuracy').dropna()
    by_cell = (100*each).groupby('cell')
    found = by_cell.mean()[list(WAYS)].assign(seeds=by_cell.size())
    return found.loc[list(CELLS.values())].set_axis(list(CELLS))

def seeds_of(found):
    "Over how many seeds the means are, such as `2` or `2 to 3`"
    return ' to '.join(str(o) for o in sorted({found.seeds.min(), found.seeds.max()}))

def mark(found): return hashlib.sha256(found.round(4).to_csv().encode()).hexdigest()[:16]

def is_drawn(runs=RUNS, picture=PICTURE):
    "Whether the picture shows the runs that are there"
    from PIL import Image
    if not Path(picture).exists(): return False
    with Image.open(picture) as im: return im.info.get('Description') == mark(accuracies(runs))

def figure(*args, **kwargs):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt.subplots(*args, layout='constrained', **kwargs)

def draw(runs=RUNS, picture=PICTURE):
    "A line for each cell, from plain training to the callback"
    found = accuracies(runs)[::-1]
    fig,ax = figure(figsize=(8.4,3.1))
    ys = range(len(found))
    ax.hlines(ys, found.plain, found.jocor3, color='tab:blue', alpha=.35, lw=3)
    for way,name in WAYS.items():
        ax.scatter(found[way], ys, s=26 if way == 'averaged' else 52, color=COLORS[way], label=name, zorder=3)
    for y,(plain,jocor) in enumerate(zip(found.plain, found.jocor3)):
        ax.annotate(f'{jocor-plain:+.1f}', (90.6, y), va='center', fontsize=9, annotation_clip=False)
    ax.set_yticks(ys, found.index, fontsize=9)
    ax.set(xlabel='test accuracy, %', xlim=(50,90))
    ax.grid(axis='x', alpha=.3)
    ax.spines[['top','right']].set_visible(False)
    fig.legend(*ax.get_legend_handles_labels(), loc='outside upper center', ncols=3, frameon=False, fontsize=9)
    fig.savefig(picture, dpi=110, metadata=dict(Software=None, Description=mark(found[::-1])))

def audit(path, weights):
    "Write the suspects among the photographs as they were published"
    from fastai.vision.all import ImageDataLoaders, Resize, ResizeMethod, set_seed, vision_learner
    from fastai_jocor.all import audit_labels
    set_seed(0)
    parts = dict(train='train', valid='validation', item_tfms=Resize(128, ResizeMethod.Squish))
    dls = ImageDataLoaders.from_folder(path/'clothing', **parts, bs=64, num_workers=0)
    own = {} if weights == 'none' else dict(pretrained_cfg_overlay=dict(file=weights))
    found = audit_labels(vision_learner(dls, 'tf_efficientnet_lite0', **own), folder=path/'features')
    s = found.suspects()
    s = s.assign(item=[Path(o).relative_to(path/'clothing').as_posix() for o in s['item']], p_wrong=s.p_wrong.round(3))
    s[['part','item','given_label','predicted_label','p_wrong']].to_csv(SUSPECTS, index=False)

def draw_photographs(path, suspects=SUSPECTS, picture=PHOTOGRAPHS):
    "Some of the suspects, with their labels"
    from PIL import Image, ImageOps
    found = pd.read_csv(suspects)
    rows = [found[found['item'].str.contains(f'/{o}')].iloc[0] for o in SHOWN]
    fig,axs = figure(1, len(rows), figsize=(8.4,2.25))
    for ax,r in zip(axs, rows):
        with Image.open(path/'clothing'/r['item']) as im: ax.imshow(ImageOps.fit(im.convert('RGB'), (160,180)))
        ax.set_title(f'label: {r.given_label}', fontsize=9, color='tab:red')
        ax.set_xlabel(f'looks like:\n{r.predicted_label}', fontsize=9, color='tab:green')
        ax.set(xticks=[], yticks=[])
    fig.savefig(picture, dpi=110, pil_kwargs=dict(quality=85))

def main(*args):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--path', type=Path, help='folder of the data')
    p.add_argument('--weights', help="file of the body's weights, to audit again")
    a = p.parse_args(args)
    draw()
    if a.path and a.weights: audit(a.path, a.weights)
    if a.path: draw_photographs(a.path)

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
