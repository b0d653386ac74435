"""Draw the picture of the home page, nbs/images/mnist.png, from benchmarks/results/mnist_protocol.

    python tools/front.py

The picture carries a mark of the runs that it shows, so that a test can tell when others are there.
`python tools/docs.py` draws it anew then.
"""
import hashlib, json, sys, pandas as pd
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'benchmarks'/'results'/'mnist_protocol'
PICTURE = ROOT/'nbs'/'images'/'mnist.png'
WAYS = {'plain training': dict(method='standard'), 'JoCoR, two peers': dict(method='jocor', k=2, contrast='kl'),
        'JoCoR, three peers': dict(method='jocor', k=3, contrast='kl')}
COLORS = ('tab:gray','tab:orange','tab:blue')

def runs(results=RESULTS, noise='symmetric:0.5'):
    "Test accuracy of each way: a row an epoch, a column a seed"
    lines = (results/'results.jsonl').read_text(encoding='utf-8').splitlines()
    cfgs = {o['run']: o['config'] for o in map(json.loads, lines) if o['config']['noise'] == noise}
    accuracy = pd.read_csv(results/'histories.csv.gz').pivot(index='epoch', columns='run', values='accuracy')
    found = {}
    for name,want in WAYS.items():
        own = [run for run,c in cfgs.items() if all(c[k] == v for k,v in want.items())]
        if own: found[name] = accuracy[sorted(own, key=lambda run: cfgs[run]['seed'])]
    return found

def mark(found):
    text = '\n'.join(f'{name}\n{acc.to_csv()}' for name,acc in found.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]

def is_drawn(results=RESULTS, picture=PICTURE):
    "Whether the picture shows the runs that are there"
    from PIL import Image
    if not Path(picture).exists(): return False
    with Image.open(picture) as im: return im.info.get('Description') == mark(runs(results))

def draw(results=RESULTS, picture=PICTURE):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    found = runs(results)
    fig,ax = plt.subplots(figsize=(7.2,3.4), layout='constrained')
    for (name,acc),color in zip(found.items(), COLORS):
        acc,n = 100*acc,acc.shape[1]
        ax.plot(acc.mean(axis=1), color=color, lw=2.5, label=f"{name} ({n} seed{'s'*(n > 1)})")
        if n > 1: ax.fill_between(acc.index, acc.min(axis=1), acc.max(axis=1), color=color, alpha=.25, lw=0)
    ax.set(title='MNIST, half of the training labels wrong', xlabel='epoch', ylabel='test accuracy, %', xlim=(0,None))
    ax.grid(alpha=.3)
    ax.legend(loc='center right')
    fig.savefig(picture, dpi=110, metadata=dict(Software=None, Description=mark(found)))
    plt.close(fig)

if __name__ == '__main__': sys.exit(draw(*sys.argv[1:]))
